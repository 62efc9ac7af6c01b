"""Settings of --mode=demo."""

import dataclasses

from unifusion_jax import ranges
from unifusion_jax.ranges import Range


@dataclasses.dataclass
class DemoConfig:
  """Where the page of --mode=demo is served, and the most that one request may ask for."""
  host: str = '127.0.0.1'               # 0.0.0.0: whoever reaches this machine
  port: int = 7860                      # 0: a free one
  share: bool = False                   # a public address of Gradio's, which forwards to this machine
  max_references: int = 4
  max_upload_megabytes: int = 20        # of a reference's file
  max_upload_pixels: int = 25_000_000   # of a reference, by its header
  max_pixels: int = 4_194_304           # of an image
  max_images: int = 4
  max_steps: int = 100
  max_tiles: int = 12                   # of a reference
  max_tokens: int = 16_384              # of prompt, references and text, for the VLM
  max_characters: int = 4000            # of each text, before it is tokenised
  max_seconds: int = 600                # of a request once it is its turn
  max_queue: int = 16                   # requests that wait or are at work, of all users
  previews: int = 6                     # intermediate images while one is sampled; 0: none

  def problems(self) -> list[str]:
    """Settings that cannot work, a sentence each."""
    counts = ('max_upload_megabytes', 'max_upload_pixels', 'max_pixels', 'max_images', 'max_steps', 'max_tiles',
              'max_tokens', 'max_characters', 'max_seconds')
    return ranges.problems(self, 'demo.', port=Range(0, 65_535), max_references=Range(0, 10), max_queue=Range(1, 64),
                           previews=Range(0, 1000), **{name: Range(1, 10 ** 9) for name in counts})
