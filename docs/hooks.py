"""What the build of the site adds: the card of the shipped weights, which lies in the package."""

import re
from pathlib import Path

from mkdocs.structure.files import File

CARD = 'results/known_card.md'


def on_files(files, config):
  """Adds the card as a page."""
  card = Path(config.config_file_path).parent / 'know_jax' / 'weights' / 'known.md'
  files.append(File.generated(config, CARD, abs_src_path=str(card)))
  return files


def on_page_markdown(markdown, page, **_):
  """Leads links to the card, which on GitHub is a file of the package, to that page."""
  up = '../' * page.file.src_uri.count('/')
  return re.sub(r'\]\((\.\./)+know_jax/weights/known\.md\)', f']({up}{CARD})', markdown)
