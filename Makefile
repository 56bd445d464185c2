# make solo: set up and play a solo over the bundled demo backing.   make solo BACKING=my.mp3: over your own.   make studio: a page to play with.
# make test: set up and test everything.   make prepare: before a commit.   make weights: the bundled weights, from nothing.
# make image IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG: the image that trains in the cloud.   PUSH=1: into its registry too.   CUDA=cu126: for V100 and older.

PYTHON ?= python3
BACKING ?= demo
SHELL := /bin/bash
# Compiled modules are kept, else hundreds of processes compile what they import.
unexport PYTHONDONTWRITEBYTECODE
V := .venv/bin
# The environment is made once, and anew when the files that describe it change. `core` plays and trains, `env` adds the tests and the notebooks.
# Versions and hashes are those of requirements.lock. uv installs them in a fraction of pip's time; INSTALLER=pip does without it.
INSTALLER ?= uv
KEY := $(shell cat requirements.lock settings.ini setup.py | sha256sum | cut -c1-16)
CORE := .venv/.core-$(KEY)
FULL := .venv/.full-$(KEY)
PIP := $(V)/pip install -q --disable-pip-version-check
UV := $(V)/uv pip install -q --python $(V)/python -b requirements.lock

.PHONY: solo studio test core env lock sync notebooks readme prepare export weights lab image

solo: core
	@$(V)/python -m saxgpt.generate "$(BACKING)" -o out/solo.wav --mix out/mix.wav --plot out/solo.png

# Notebooks are tests too (tests/test_notebooks.py), so that one run deals out everything and shows at its end what failed.
# TESTS: which, in pytest's words.   JOBS: processes; one more than cores, since many tests wait for other processes.
TESTS ?= tests
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 7 ? n + 1 : 8)))
# MALLOC_: memory that arrays gave back stays with their process. Otherwise each large array gets new pages from the system, a tenth of all time.
MALLOC := MALLOC_MMAP_THRESHOLD_=268435456 MALLOC_TRIM_THRESHOLD_=536870912
PYTEST = OMP_NUM_THREADS=1 $(MALLOC) $(V)/python -m pytest -q -n $(JOBS) -o tmp_path_retention_policy=failed
test: env sync
	$(PYTEST) $(TESTS)

core: $(CORE)
$(CORE):
	@echo "Making the environment in .venv (a minute or two, once; 5.5 GB)"
	@rm -rf .venv && $(PYTHON) -m venv .venv
ifeq ($(INSTALLER),uv)
	@$(PIP) --no-deps --require-hashes -r <(sed -n '/^uv==/,/[^\\]$$/p' requirements.lock)
	@$(UV) -c requirements.lock -e .
else
	@$(PIP) -c <(sed 's/ *\\$$//; /--hash/d' requirements.lock) -e .
endif
	@$(V)/python -c 'import librosa.beat, librosa.core.audio, librosa.core.pitch, librosa.util.utils' # compiled and kept by numba, whose cache two processes would spoil
	@touch $@

env: $(FULL)
$(FULL): $(CORE)
ifeq ($(INSTALLER),uv)
	@$(UV) --no-deps --require-hashes -r requirements.lock
else
	@$(PIP) --no-deps --require-hashes -r requirements.lock
endif
	@touch $@

# After a change in settings.ini. UPGRADE=1: the newest versions that it allows.
lock: core
	@$(V)/python -c 'import uv' 2> /dev/null || $(PIP) uv
	$(V)/python tests/lock.py $(if $(UPGRADE),--upgrade)

# Notebooks clean, package and README made from them: nothing may differ from what is committed.
sync: env
	$(V)/nbdev_clean
	$(V)/nbdev_export
	$(V)/python tests/readme.py
	git diff --exit-code -- nbs saxgpt README.md
	@test -z "$$(git status --porcelain -- nbs saxgpt README.md)" || { git status --short -- nbs saxgpt README.md; echo "make sync: commit these files"; exit 1; }

notebooks: env
	$(PYTEST) tests/test_notebooks.py

readme: env
	$(V)/python tests/readme.py

export: env
	$(V)/nbdev_export

prepare: env
	$(V)/nbdev_clean && $(V)/nbdev_export && $(V)/python tests/readme.py

studio: env
	$(V)/python -m saxgpt.studio

lab: env
	$(V)/jupyter lab nbs

# The bundled codec and model from nothing: some twelve hours on two cores, 90 GB of disk. First in a small world, of one trio in one room: the codec
# hears 5 h; then come short windows, where attention is cheap, of tunes on nine forms and of tunes with changes of their own, and the full 30 s.
# Then in the wide world, where the codec is fitted again and the backing gets a codec of pitches; the model goes on from the weights so far.
# FONTS: a folder of soundfonts; the command says which are missing.
FONTS ?= data/fonts
WIDE := data/wide
CODES = $(V)/saxgpt demo --out $(WIDE) --codes --codec models/wide-codec
HELD := --without-feels shuffle,mambo --without-bands 'organ trio,vibraphone trio'
FORMS := data/forms
DEMO := data/demo
SHORT := $(DEMO)/7_short
TRAIN = $(V)/saxgpt train --config demo --ddp --num-gpus 2 model.separate_embeddings=false
WIDER = $(V)/saxgpt train --config demo data.train_path=$(WIDE)/7_datasets/train.safetensors data.val_path=$(WIDE)/7_datasets/val.safetensors \
	training.embeddings_from=models/wide-codec training.batch_size=8 training.precision=fp32 training.ema_decay=0.99 \
	training.scheduler.warmup_steps=50 training.val_interval=200
weights: env
	$(V)/saxgpt demo --out $(FORMS)/corpus --minutes 300 --seed 1 --drawn 0
	$(V)/python -m saxgpt.training.fit_codec --corpus $(FORMS)/corpus --out saxgpt/weights/mel-rvq
	$(V)/python -m saxgpt.training.fit_spectra --codec saxgpt/weights/mel-rvq --corpus $(FORMS)/corpus
	$(V)/saxgpt demo --out $(FORMS)/corpus --minutes 1800 --seed 1 --drawn 0
	sed 's,$(DEMO),$(FORMS),' saxgpt/configs/data/demo.yaml > $(FORMS)/forms.yaml
	$(V)/saxgpt pipeline --config $(FORMS)/forms.yaml dataset.seq_len=500 dataset.stride=500
	$(V)/saxgpt demo --out $(DEMO)/corpus --minutes 1800 --seed 1
	$(V)/saxgpt pipeline --config demo
	$(V)/saxgpt pipeline --config demo --only dataset data_paths.datasets_dir=$(SHORT) dataset.seq_len=500 dataset.stride=500
	$(TRAIN) data.train_path=$(FORMS)/7_datasets/train.safetensors data.val_path=$(FORMS)/7_datasets/val.safetensors training.output_dir=models/forms \
		training.max_steps=8047 training.scheduler.total_steps=26000 training.optimizer.lr=0.0025 training.codebook_weights=null \
		training.context_dropout.hold_steps=800 training.context_dropout.ramp_steps=2000 training.val_interval=1600
	$(V)/python -m saxgpt.pretrained models/forms/checkpoints/last models/forms/weights
	$(TRAIN) data.train_path=$(SHORT)/train.safetensors data.val_path=$(SHORT)/val.safetensors training.output_dir=models/short \
		training.resume_from_checkpoint=models/forms/weights training.max_steps=9349 training.scheduler.total_steps=14000 \
		training.scheduler.warmup_steps=50 training.context_dropout.start_rate=0.1 training.val_interval=1000
	$(V)/python -m saxgpt.pretrained models/short/checkpoints/last models/short/weights
	$(TRAIN) training.resume_from_checkpoint=models/short/weights training.max_steps=1200 training.batch_size=1 training.optimizer.lr=0.001 \
		training.scheduler.warmup_steps=50 training.context_dropout.start_rate=0.1 training.val_interval=400
	$(V)/python -m saxgpt.pretrained models/demo/checkpoints/best models/demo/weights
	$(V)/saxgpt demo --world wide --fonts $(FONTS) --out $(WIDE)/sound/wide --minutes 240 --seed 1
	$(V)/saxgpt demo --out $(WIDE)/sound/plain --minutes 42 --seed 1
	$(V)/python -m saxgpt.training.fit_codec --corpus $(WIDE)/sound --out models/wide-mel --frames 240000 --start saxgpt/weights/mel-rvq
	$(V)/python -m saxgpt.training.fit_spectra --codec models/wide-mel --corpus $(WIDE)/sound --start saxgpt/weights/mel-rvq --steps 6000
	$(V)/python -m saxgpt.training.fit_codec --corpus $(WIDE)/sound --out models/wide-codec --frames 200000 --start models/wide-mel --backings
	$(CODES) --world wide --fonts $(FONTS) --minutes 480 --seed 11 $(HELD) --without-fonts FluidR3
	$(CODES) --world wide --fonts $(FONTS) --minutes 600 --seed 12 $(HELD)
	$(CODES) --minutes 150 --seed 1
	sed 's,$(DEMO),$(WIDE),; s,codec: bundled,codec: models/wide-codec,' saxgpt/configs/data/demo.yaml > $(WIDE)/wide.yaml
	$(V)/saxgpt pipeline --config $(WIDE)/wide.yaml --only dataset dataset.seq_len=500 dataset.stride=250
	$(WIDER) training.output_dir=models/wide training.resume_from_checkpoint=models/demo/weights \
		training.max_steps=4336 training.scheduler.total_steps=20000 training.context_dropout.start_rate=0.4 \
		training.context_dropout.hold_steps=100 training.context_dropout.ramp_steps=500
	$(V)/python -m saxgpt.pretrained models/wide/checkpoints/last models/wide/weights
	$(WIDER) training.output_dir=models/settled training.resume_from_checkpoint=models/wide/weights training.max_steps=800 \
		training.context_dropout.start_rate=0.1
	cp models/wide-codec/codec.json models/wide-codec/codec.safetensors saxgpt/weights/mel-rvq/
	$(V)/saxgpt demo --out data/pitches --codes --minutes 24 --seed 901
	$(V)/saxgpt demo --world wide --fonts $(FONTS) --out data/pitches --codes --minutes 48 --seed 902
	$(V)/python -c 'from saxgpt.takes.changes import write_pitches; write_pitches("data/pitches")'
	$(V)/saxgpt demo --world wide --fonts $(FONTS) --out data/chords --codes --minutes 480 --seed 21 $(HELD)
	$(V)/saxgpt demo --world wide --fonts $(FONTS) --out data/chords --codes --minutes 210 --seed 22 $(HELD)
	$(V)/saxgpt demo --out data/chords --codes --minutes 60 --seed 1
	$(V)/python -m saxgpt.training.fit_chords --corpus data/chords --out saxgpt/weights/mel-rvq/chords.safetensors
	$(V)/python -m saxgpt.pretrained models/settled/checkpoints/last saxgpt/weights/bundled --dataset $(WIDE)/7_datasets/train.safetensors
	$(V)/saxgpt sweep --config demo data.val_path=$(WIDE)/7_datasets/val.safetensors --checkpoint saxgpt/weights/bundled \
		--output-dir out/sweep --n 24 && cp out/sweep/sweep.json saxgpt/weights/bundled/
	$(V)/saxgpt worlds --fonts $(FONTS) --test

image:
	@test -n "$(IMAGE)" || { echo "make image: give it a name, IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG"; exit 2; }
	@[[ "$(IMAGE)" =~ ^[^[:upper:]]*(:[^/]*)?$$ ]] || { echo "make image: $(IMAGE): Docker takes lower-case names only; put yours in the place of MY-PROJECT"; exit 2; }
	docker build --platform linux/amd64 $(if $(CUDA),--build-arg CUDA=$(CUDA)) -t "$(IMAGE)" .
	$(if $(PUSH),docker push "$(IMAGE)")
