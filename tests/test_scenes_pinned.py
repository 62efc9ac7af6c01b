"""Examples of the narrow world, byte for byte: figures of shipped models rest on them, and runs go on from them."""

import hashlib
import json

import pytest

from unifusion_jax.scenes import examples

COUNT = 40
# Digests of the first COUNT examples' words and images, taken before there was a wider world.
PINNED = {
    't2i/train': ('a56c9bdf9bddebfc', '0e6461d40aedfee9'),
    't2i/test': ('b681984f2b046d2b', 'e4f379093699179f'),
    't2i/heldout': ('27d0b901373bd8ef', 'a900441d365ca3f7'),
    'edit/train': ('1b7bca2a33309636', 'f4b8c64c9c13c5b0'),
    'edit/test': ('c7135fc613756090', '678709a3f6302e2b'),
    'edit/heldout': ('e2e9c5cc80fa4d30', '3dbe58a1289e66c5'),
    'reconstruct/train': ('4c3ef88a2911a92e', 'dbf9895e07c2fc2e'),
    'reconstruct/test': ('892cbcd211e2e21a', '190ff3510ed0acbe'),
    'reconstruct/heldout': ('6cc8bd023b6bad62', 'abacd1a5f96b487c'),
    'multi/train': ('9a23f53287837bd9', 'e04de6329c352724'),
    'multi/test': ('7e49e17b46cf4807', 'e0f3d25ec4ac48e7'),
    'multi/heldout': ('caa77a33b638452e', 'c67a67f0df341e08'),
    'caption/train': ('2f5b548d49d8129d', '6792af844fee64c9'),
    'caption/test': ('8f652708392ececd', '0db6d7a0e0894cbd'),
    'caption/heldout': ('9120186ac7a86fa5', '36bf072e3e217761'),
    'question/train': ('e247a1ec5d4fe00f', '16c0c42ffc035cb3'),
    'question/test': ('23cdd6520f7995f7', 'dcc0460a80660a2f'),
    'question/heldout': ('b3749d63d4b3e189', 'ab7d4cddbd726274'),
    'rewrite/train': ('1a3ec120def49f26', 'e3b0c44298fc1c14'),
    'rewrite/test': ('525fddec93d14b9f', 'e3b0c44298fc1c14'),
    'rewrite/heldout': ('89a75b8fecc2972f', 'e3b0c44298fc1c14'),
}


@pytest.mark.parametrize('name', PINNED)
def test_examples_stay_as_they_were(name):
  task, split = name.split('/')
  words, images = hashlib.sha256(), hashlib.sha256()
  for i in range(COUNT):
    record = examples.example(task, split, i)
    for image in (*record.pop('references'), record.pop('target')):
      if image is not None:
        images.update(repr(image.shape).encode())
        images.update(image.tobytes())
    words.update(json.dumps(record, sort_keys=True).encode())
  assert (words.hexdigest()[:16], images.hexdigest()[:16]) == PINNED[name]
