"Everything comes from settings.ini: `requirements` is the core, every `NAME_requirements` is the extra `[NAME]`."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
suffix = '_requirements'
extras = {k[:-len(suffix)]: v.split() for k, v in cfg.items() if k.endswith(suffix)}

setup(
    name=cfg['lib_name'], version=cfg['version'], license='Apache-2.0',
    description=cfg['description'], keywords=cfg['keywords'],
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers',
                 'License :: OSI Approved :: Apache Software License', 'Programming Language :: Python :: 3'],
    packages=find_packages(include=['saxgpt', 'saxgpt.*']), include_package_data=True,
    python_requires=f">={cfg['min_python']},<3.14",
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False)
