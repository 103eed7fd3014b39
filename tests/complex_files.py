"""Complex tensors in safetensors files, which old versions of the library do not write."""

import json


def mark_complex(path, name):
  """Makes a float32 tensor `[..., 2 n]` of a file a complex64 one `[..., n]` of the same bytes."""
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + length])
  header[name]['dtype'] = 'C64'
  header[name]['shape'][-1] //= 2
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + length :])
