"""A checkpoint's tokenizer, by transformers; InternLM2's, without the code that its checkpoint brings for it.

InternVL2.5-8B brings a sentencepiece model (byte-pair encoding with byte fall-back) and a list of added tokens; that is
all there is to its tokenizer.
"""

import codecs
import copy
import functools
import pathlib
from typing import Any

from unifusion_jax import json_file
from unifusion_jax.errors import UserError

_PLACEHOLDER = '[UNUSED_TOKEN_'  # start of the pieces that added tokens may replace
_FILES = ('tokenizer_config.json', 'tokenizer.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
          'config.json')  # what transformers reads of JSON
_ROLES = ('bos_token', 'eos_token', 'pad_token', 'unk_token')


@functools.cache
def plain(folder: str) -> Any:
  """A second tokenizer, for text whose special tokens are plain text (`encode(text, split_special_tokens=True)`).

  The flag sets a state of the tokenizer, and data threads share it: with one object for both uses, two threads would
  now and then tokenise a template as text or a user's text as template.
  """
  return copy.deepcopy(load(folder))


@functools.cache
def load(folder: str) -> Any:
  """The tokenizer of a folder, with its chat template. UserError when there is none."""
  import transformers  # a slow import that only tokenizing needs
  transformers.logging.set_verbosity_error()
  path = pathlib.Path(folder)
  settings = path / 'tokenizer_config.json'
  if not settings.exists() and not (path / 'tokenizer.json').exists():
    raise UserError(f'{folder} holds no tokenizer.json: point config.vlm at a Hugging Face VLM folder')
  config_json = json_file.read(settings) if settings.exists() else {}
  is_internlm2 = str(config_json.get('tokenizer_class')).startswith('InternLM2Tokenizer')
  if is_internlm2 and not (path / 'tokenizer.json').exists():
    return _internlm2(path, config_json)
  try:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # or it asks
  except Exception as error:  # of the rust library too, which has no class of its own
    raise UserError(_reason(path, error)) from error
  processors = path / 'chat_template.json'  # where some checkpoints keep the template, for their processor alone
  if not tokenizer.chat_template and processors.exists():
    tokenizer.chat_template = json_file.read(processors).get('chat_template')
  return tokenizer


def _reason(path: pathlib.Path, error: Exception) -> str:
  """Why transformers does not load the tokenizer of a folder, with the file that is to blame."""
  for file in (path / name for name in _FILES):
    if file.exists():
      json_file.read(file)  # its own error is the better one
      if file.read_bytes().startswith(codecs.BOM_UTF8):
        return f'{file} begins with a byte-order mark, which transformers does not read: save it as plain UTF-8'
  return (f'{path}: transformers cannot load the tokenizer of this folder: {" ".join(str(error).split())[:300]}; '
          'take the tokenizer files of the checkpoint again')


def _internlm2(path: pathlib.Path, config_json: dict):
  import tokenizers
  from tokenizers import decoders, models, normalizers
  import transformers
  from transformers.convert_slow_tokenizer import import_protobuf
  from transformers.tokenization_utils_base import generate_merges

  if not (path / 'tokenizer.model').exists():
    raise UserError(f'{path} holds no tokenizer.model: download it from the public checkpoint')
  pb2: Any = import_protobuf()
  proto = pb2.ModelProto.FromString((path / 'tokenizer.model').read_bytes())
  rules = proto.normalizer_spec
  if proto.trainer_spec.model_type != 2 or rules.precompiled_charsmap or rules.remove_extra_whitespaces:
    raise UserError(f'{path}/tokenizer.model is no byte-pair encoding of the text as it is (model_type '
                     f'{proto.trainer_spec.model_type}, normalisation {rules.name!r}): this is not InternLM2\'s '
                     'tokenizer')
  listed = {int(i): token['content'] for i, token in config_json.get('added_tokens_decoder', {}).items()}
  names = [listed.get(i, piece.piece) if piece.piece.startswith(_PLACEHOLDER) else piece.piece
           for i, piece in enumerate(proto.pieces)]
  vocab = {name: i for i, name in enumerate(names)}
  # Control tokens and bytes stand in the vocabulary too, but text that spells them is never merged into them
  ordinary = {piece.piece for piece in proto.pieces if piece.type == 1}
  merges = [pair for pair in generate_merges(vocab) if ''.join(pair) in ordinary]
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True,
                                              byte_fallback=proto.trainer_spec.byte_fallback))
  prefix = [normalizers.Prepend('\u2581')] if rules.add_dummy_prefix else []
  tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(' ', '\u2581')])
  tokenizer.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()]
                                        + [decoders.Strip(' ', 1, 0)] * len(prefix))
  user_defined = [name for name, piece in zip(names, proto.pieces) if piece.type == 4 and name == piece.piece]
  user_symbols = [tokenizers.AddedToken(name, normalized=False, special=False) for name in user_defined]  # never cut
  tokenizer.add_tokens(user_symbols)
  for i, token in sorted(listed.items()):
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
    if tokenizer.token_to_id(token) != i:
      raise UserError(f'{path}/tokenizer_config.json gives {token!r} the id {i}, and the tokenizer '
                       f'{tokenizer.token_to_id(token)}: the folder mixes files of different checkpoints')
  roles = {role: config_json[role] if isinstance(config_json[role], str) else config_json[role]['content']
           for role in _ROLES if config_json.get(role)}
  template = path / 'chat_template.jinja'
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles,
      chat_template=template.read_text() if template.exists() else config_json.get('chat_template'))
