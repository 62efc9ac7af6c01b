"""Distances between images, against their formulas and torch's operations; and their way into reports."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_evaluation import COLOURS, write_list
import torch
import torch.nn.functional as F

from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import images as metrics
from unifusion_jax.evaluation import records


def noise(*shape, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture(scope='module')
def tensors():
  """Random weights of AlexNet and of the five heads, by their public names."""
  rng, inputs, weights = np.random.default_rng(0), 3, {}
  for i, (number, outputs, side, _, _) in enumerate(metrics.CONVOLUTIONS):
    shape = outputs, inputs, side, side
    weights[f'features.{number}.weight'] = rng.normal(size=shape).astype(np.float32) * (inputs * side * side) ** -0.5
    weights[f'features.{number}.bias'] = rng.normal(size=outputs).astype(np.float32) * 0.1
    weights[f'lin{i}.model.1.weight'] = rng.random((1, outputs, 1, 1), np.float32)
    inputs = outputs
  return weights


@pytest.fixture(scope='module')
def folder(tensors, tmp_path_factory):
  path = tmp_path_factory.mktemp('lpips')
  save_file(tensors, path / 'model.safetensors')
  return path


def test_psnr():
  image = noise(2, 8, 8, 3) // 2
  np.testing.assert_allclose(metrics.psnr(image, image), 10 * np.log10(255 ** 2 / 1e-3))
  np.testing.assert_allclose(metrics.psnr(image, image + np.uint8(1)), 10 * np.log10(255 ** 2), rtol=1e-6)
  assert metrics.psnr(image[0], image[1]) == metrics.psnr(image, image[::-1])[0]


def test_ssim_is_its_formula():
  """In each channel and each window that lies inside the image."""
  x, y = noise(13, 15, 3), noise(13, 15, 3, seed=1)
  y = (0.7 * x + 0.3 * y).astype(np.uint8)
  weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5 ** 2))
  weights = np.outer(weights, weights) / weights.sum() ** 2
  values = []
  for top, left, channel in np.ndindex(3, 5, 3):
    a, b = (image[top:top + 11, left:left + 11, channel].astype(float) for image in (x, y))
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values.append((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
  np.testing.assert_allclose(metrics.ssim(x, y), np.mean(values), rtol=1e-10)
  np.testing.assert_allclose(metrics.ssim(np.stack([x, x]), np.stack([y, x])), [np.mean(values), 1], rtol=1e-10)
  with pytest.raises(UserError, match='15x10 is smaller than the window'):
    metrics.ssim(x[:10], y[:10])


def test_lpips_is_torchs(tensors, folder):
  x, y = noise(3, metrics.LEAST, 70, 3), noise(3, metrics.LEAST, 70, 3, seed=1)
  y[1] = x[1] // 2 + 60

  def features(image):
    image = torch.tensor(image).permute(0, 3, 1, 2) / 127.5 - 1
    image = (image - torch.tensor([-.030, -.088, -.188])[:, None, None]) / torch.tensor(
        [.458, .448, .450])[:, None, None]
    for i, (number, _, _, stride, padding) in enumerate(metrics.CONVOLUTIONS):
      weight, bias = (torch.tensor(tensors[f'features.{number}.{kind}']) for kind in ('weight', 'bias'))
      image = F.relu(F.conv2d(F.max_pool2d(image, 3, 2) if i in (1, 2) else image, weight, bias, stride, padding))
      yield image / (image.square().sum(1, keepdim=True).sqrt() + 1e-10)

  wanted = sum(F.conv2d((a - b).square(), torch.tensor(tensors[f'lin{i}.model.1.weight'])).mean((1, 2, 3))
               for i, (a, b) in enumerate(zip(features(x), features(y))))
  lpips = metrics.Lpips(folder)
  np.testing.assert_allclose(lpips(x, y), wanted, rtol=1e-4)
  assert lpips(x, y)[1] < lpips(x, y)[0] and np.all(lpips(x, x) == 0)


def test_lpips_refuses_other_weights_and_small_images(tensors, folder, tmp_path):
  save_file({name: x for name, x in tensors.items() if name != 'lin3.model.1.weight'} | {
      'classifier.1.bias': np.zeros(3, np.float32)}, tmp_path / 'model.safetensors')
  with pytest.raises(UserError) as error:
    metrics.Lpips(tmp_path)
  assert 'missing: lin3.model.1.weight' in str(error.value) and 'unused: classifier.1.bias' in str(error.value)
  torch.save({name: torch.tensor(x) for name, x in tensors.items()}, tmp_path / 'alex.pth')
  with pytest.raises(UserError):
    metrics.Lpips(tmp_path / 'alex.pth')
  with pytest.raises(UserError, match='70x30 is too small for LPIPS'):
    metrics.Lpips(folder)(noise(1, 30, 70, 3), noise(1, 30, 70, 3))


def test_embedding_distance(pipe):
  """Of the vision tower's mean state of each image, alone of its batch and of any size."""
  encoder, images = pipe.prompt_encoder, [noise(64, 64, 3), noise(64, 64, 3, seed=1), noise(100, 50, 3, seed=2)]
  distance = lambda a, b: metrics.embedding_distance(pipe.frozen.vlm, encoder, a, b, 2)
  found = distance(images, images[::-1])
  np.testing.assert_allclose(found[1], 0, atol=1e-6)
  assert found[0] > 1e-4
  np.testing.assert_allclose(found[0], found[2], atol=1e-6)
  np.testing.assert_allclose(distance(images[:1], images[2:]), found[:1], atol=1e-6)
  tiles = np.stack([encoder.image_processor.preprocess((image,), 1)[0] for image in (*images, images[0])])
  tokens = encoder.image_processor.preprocess((images[0],), 1)[1][0]
  mean = np.asarray(jax.jit(pipe.frozen.vlm.image_features)(tiles))[:, :tokens].mean(axis=1)
  cosine = mean[0] @ mean[2] / np.linalg.norm(mean[0]) / np.linalg.norm(mean[2])
  np.testing.assert_allclose(found[0], 1 - cosine, atol=1e-5)


def test_reports_have_them(pipe, recipe, folder, tmp_path):
  """Of records of one's own, beside their truths; with LPIPS where its weights are given."""
  made = recipe(eval=records.RecordsEvaluation(examples=4, batch_size=4, lpips=str(folder)))
  made.data.path = write_list(tmp_path / 'own.jsonl', edits=0)
  report = records.evaluate(pipe, made, tmp_path)
  assert report['similarity'].keys() == {'psnr_db', 'ssim', 'lpips', 'embedding_distance'}
  for value in report['similarity'].values():
    assert value['low'] <= value['mean'] <= value['high']
  json.dumps(report)
  truths = np.stack([imaging.read(tmp_path / f'{name}.png') for name in COLOURS])
  same = metrics.summary(metrics.measures(truths, truths))
  assert same['ssim'] == dict(mean=1) and 'lpips' not in same
  two = metrics.summary(dict(x=np.array([1.0, 1, 3, 3])), ['a', 'a', 'b', 'b'])['x']
  assert (two['low'], two['high']) == (1, 3)  # of two requests, not of four images
  one = metrics.summary(metrics.measures(truths[:1], truths[:1]))
  assert one['ssim'] == dict(mean=1)  # a single image has no interval
  made.eval.lpips = str(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='nowhere'):
    records.evaluate(pipe, made, tmp_path)
