"""Draws test accuracy over the plane of a trajectory, with the predictions on it.

    python bin/landscape.py --workdir=W --config=configs/landscape_glyphs.py

W is the workdir of a finished run of bin/forget.py; without --workdir, ./workdir. Writes
landscape/landscape.json and landscape/landscape.png there.
"""

from pathlib import Path

from know_jax import landscape
from know_jax.runs import cli

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'landscape_glyphs.py')


def main() -> None:
  workdir = cli.workdir()
  print(landscape.report(landscape.run(_CONFIG.value, workdir)))
  print(f'picture: {workdir / "landscape" / "landscape.png"}')


if __name__ == '__main__':
  cli.run(main)
