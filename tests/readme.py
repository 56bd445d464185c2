"Make README.md from nbs/index.ipynb: the notebook as nbdev documents it, as Markdown."
import re
from pathlib import Path

from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults
from nbformat import from_dict

root = Path(__file__).resolve().parents[1]


def readme() -> str:
    "The text of README.md."
    processor = NBProcessor(root/'nbs/index.ipynb', procs=FilterDefaults().procs())
    processor.process()
    text, _ = MarkdownExporter().from_notebook_node(from_dict(processor.nb))
    text = re.sub(r'^---\n.*?\n---\n', '', text, flags=re.S)  # Quarto's front matter
    title = processor.nb.cells[0].source
    title = re.search(r'^title: (.*)$', title, re.M)
    text = re.sub(r'\]\((images/)', r'](nbs/\1', text)
    text = re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'
    return (f'# {title[1]}\n\n' if title and not text.startswith('# ') else '') + '<!-- Made from nbs/index.ipynb by `make readme`; edit that. -->\n\n' + text


if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
