"""Table 4: captions of Flickr8k by table 2's PVTv2 and a transformer decoder; and its stand-in.

Command:   python bin/study.py --workdir=W --config=configs/table4.py
           --config.sources=W2/sources takes the forgetting runs of table 2
Also:      --config=configs/table4.py:small, the stand-in, from the sources of table 2's: a sample
           of 800 images at 32 pixels, a decoder of 32 units; naive transfer and scratch alone,
           which tell whether pre-training helps captions by more than the noise
Then:      python bin/study.py --workdir=W --config=configs/table4.py:small
           --config.arms="('persistence','known','known_leaf')" --examples=docs/results/table4.png
           draws captions (of the forgetting runs in W the first alone is needed, which
           --config.source_seeds=1 makes);
           python bin/study.py --workdir=W --table=4 --report=docs/results/table4.md
Hardware:  one GPU of 24 GB, not run yet; estimated as in configs/table2.py, after its sources: 12
           GB of activations, 0.13 GB of logits for 128 captions of 50 tokens; 30,000 captions and
           52 epochs at 4.9 G operations each, 4 minutes a transfer. The stand-in: 1 core, about 1
           minute a source seed
Data:      flickr8k prepared in TFDS's format with the features image and captions; TFDS has none
Paper:     section 4.3 and table 4 (50 epochs of Adam, masked accuracy, r = 1/3). TensorFlow's
           tutorial has the decoder and the metric. The stand-in reproduces no number there
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = 'paper') -> ConfigDict:
  table2 = runpy.run_path(str(Path(__file__).with_name('table2.py')))
  config = table2['get_config'](size)
  config.transfer.task = 'captioning'
  config.transfer.classes = ()
  config.transfer.optimizer = 'adam'
  config.transfer.labels_per_class = 0
  config.transfer.warmup_epochs = 2
  config.transfer.lr = 1e-3
  if size == 'small':
    config.transfer.dataset = 'flickr8k_mini'
    config.transfer.image_size = (32, 32)
    config.transfer.captions = {
      'vocabulary': 1000, 'max_length': 20, 'units': 32, 'heads': 2, 'layers': 1, 'dropout': 0.1,
    }  # fmt: skip
    config.transfer.validation_examples = 400
    config.transfer.batch_size = 40
    config.transfer.epochs = 4
    rates = ({'predictor': 'persistence', 'lr_scale': scale} for scale in (0.3, 3.0))
    config.arms = ('scratch', 'persistence', *rates)
    return config
  config.transfer.dataset = 'flickr8k'
  config.transfer.image_size = (224, 224)
  config.transfer.validation_examples = 1500
  config.transfer.epochs = 50
  config.transfer.lr = 1e-4
  return config
