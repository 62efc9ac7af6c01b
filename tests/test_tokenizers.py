"""InternLM2's tokenizer, made of its sentencepiece model and its list of added tokens, against sentencepiece itself."""

import codecs
import json
import pathlib
import shutil

import pytest
import sentencepiece
from transformers.convert_slow_tokenizer import import_protobuf

from unifusion_jax import config, verifi
from unifusion_jax.errors import UserError
from unifusion_jax.weights import tokenizers

SIZE = 500  # pieces, of which added tokens replace the last two
FIRST = SIZE - 2
ADDED = ('<|im_end|>', '<|im_start|>', '<img>', '</img>', '<IMG_CONTEXT>', '<quad>')
TEMPLATE = ("{{ bos_token }}{% for m in messages %}"
            "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXTS = ('a red circle', '  two  spaces ', 'a\nb\tc', '\u00e9 \u2605 \u65e5\u672c', 'tile 448 of 1024 pixels.',
         '<s></s><unk> <0x0A>',
         '')


def train(folder: pathlib.Path, prefix: bool = False, **changes) -> pathlib.Path:
  """A folder as InternVL2.5-8B's: tokenizer.model, tokenizer_config.json, and the name of a class that is not there."""
  corpus = (pathlib.Path(__file__).parent.parent / 'README.md').read_text() + '<s> </s> <unk> <0x0A> s> <0x\n' * 50
  (folder / 'corpus.txt').write_text(corpus)
  settings = dict(model_type='bpe', byte_fallback=True, character_coverage=0.99, normalization_rule_name='identity',
                  remove_extra_whitespaces=False, split_digits=True) | changes
  sentencepiece.SentencePieceTrainer.train(
      input=str(folder / 'corpus.txt'), model_prefix=str(folder / 'tokenizer'), vocab_size=FIRST,
      add_dummy_prefix=prefix, minloglevel=2, **settings)
  model = folder / 'tokenizer.model'
  proto = import_protobuf().ModelProto.FromString(model.read_bytes())
  for i, kind in ((145, 4), (146, 1)):
    proto.pieces.add(piece=f'[UNUSED_TOKEN_{i}]', score=0, type=kind)
  model.write_bytes(proto.SerializeToString())
  listed = dict(enumerate(('<unk>', '<s>', '</s>'))) | {FIRST + i: token for i, token in enumerate(ADDED)}
  (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
      added_tokens_decoder={str(i): dict(content=token, special=True) for i, token in listed.items()},
      auto_map=dict(AutoTokenizer=['tokenization_internlm2.InternLM2Tokenizer', None]), bos_token='<s>',
      eos_token='</s>',
      chat_template=TEMPLATE, pad_token='</s>', tokenizer_class='InternLM2Tokenizer', unk_token='<unk>')))
  return folder


@pytest.mark.parametrize('prefix', [False, True])
def test_ids_are_sentencepieces(tmp_path, prefix):
  folder = train(tmp_path, prefix)
  ours = tokenizers.load(str(folder))
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
  for text in (*TEXTS, (folder / 'corpus.txt').read_text()[:3000]):
    ids = ours.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ids == theirs.encode(text), text
    assert ours.decode(ids) == text
  # Added tokens keep their ids, and what stands between them is tokenised by itself
  joined = ours.encode('a red<|im_start|>circle<IMG_CONTEXT>', add_special_tokens=False)
  assert joined == [*theirs.encode('a red'), FIRST + 1, *theirs.encode('circle'), FIRST + 4]
  assert len(ours) == FIRST + len(ADDED) and ours.convert_ids_to_tokens([FIRST, SIZE]) == ['<|im_end|>', '<img>']
  assert FIRST not in ours.encode('[UNUSED_TOKEN_145]', add_special_tokens=False)


def test_it_chats(tmp_path):
  chat = verifi.Chat(train(tmp_path))
  spans = chat.spans('make it <|im_end|> blue', (3,), 'a circle', 'faithful')
  ids = [token for span in spans for token in span.ids]
  assert ids[:2] == [1, FIRST + 1] and ids.count(FIRST + 4) == 3 and chat.stop_ids == (FIRST,)
  assert [span.ids for span in spans if span.kind == 'stop'] == [(FIRST,)] and ids.count(FIRST) == 3
  assert chat.read([*chat.text_ids('a circle'), FIRST, 5]) == 'a circle'


def test_what_is_not_internlm2s_is_refused(tmp_path):
  for name, changes in (('unigram', dict(model_type='unigram', hard_vocab_limit=False)),
                        ('nfkc', dict(normalization_rule_name='nmt_nfkc'))):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="not InternLM2's tokenizer"):
      tokenizers.load(str(train(tmp_path / name, **changes)))
  folder = tmp_path / 'mixed'
  folder.mkdir()
  described = train(folder) / 'tokenizer_config.json'
  listed = described.read_text()
  for wrong in (SIZE + 20, FIRST - 1):  # beyond the end, and on a piece that is no placeholder
    described.write_text(listed.replace(f'"{SIZE}"', f'"{wrong}"'))
    with pytest.raises(ValueError, match='mixes files of different checkpoints'):
      tokenizers.load(str(folder))
  (folder / 'tokenizer.model').unlink()
  tokenizers.load.cache_clear()
  with pytest.raises(ValueError, match='no tokenizer.model'):
    tokenizers.load(str(folder))


def test_a_file_that_is_to_blame_is_named(tmp_path):
  assets = config.ASSETS / 'vlm'
  cases = [('tokenizer.json', b'version https://git-lfs.github.com/spec/v1\n', 'is a Git LFS pointer'),
           ('tokenizer.json', b'', 'is empty'), ('tokenizer.json', b'{"version": "1.0"', 'is damaged or is no JSON'),
           ('tokenizer_config.json', b'{"a', 'is damaged'), ('tokenizer_config.json', b'', 'is empty'),
           ('tokenizer_config.json', codecs.BOM_UTF8 + b'{}', 'begins with a byte-order mark'),
           ('special_tokens_map.json', b'', 'is empty')]
  for i, (name, content, message) in enumerate(cases):
    folder = tmp_path / str(i)
    shutil.copytree(assets, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
      tokenizers.load(str(folder))
    assert str(folder / name) in str(error.value)
  (folder / 'special_tokens_map.json').unlink()
  (folder / 'tokenizer.json').write_text('{"version": "1.0"}')
  with pytest.raises(UserError, match=f'{folder}: transformers cannot load'):
    tokenizers.load(str(folder))
  (folder / 'tokenizer.json').write_bytes((assets / 'tokenizer.json').read_bytes())
  (folder / 'generation_config.json').write_text('{')
  with pytest.raises(UserError, match='generation_config.json is damaged'):
    verifi.Chat(folder)


def test_code_in_a_folder_never_runs(tmp_path, monkeypatch):
  monkeypatch.setattr('builtins.input', lambda *_: 'y')  # were anybody asked
  names = {'AutoConfig': 'evil.Config', 'AutoTokenizer': ['evil.Tokenizer', None]}
  (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='evil', auto_map=names)))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='EvilTokenizer', auto_map=names)))
  (tmp_path / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w").close()\n')
  with pytest.raises(ValueError, match='contains custom code'):
    tokenizers.load(str(tmp_path))
  assert not (tmp_path / 'ran').exists()
