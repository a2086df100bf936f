"""The model card that goes with exported weights."""
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.weights.export import timm_arguments


def card(*, title: str, files: Mapping[str, str], use: str, config: Mapping[str, Any], data: Any, view: Any,
         scores: Mapping[str, float]) -> str:
    """README.md in Markdown.

    Args:
      files: what each is.
      use: code that loads them.
      config: of the run.
      data, view: of the run; data None where the data set is not there.
      scores: '<evaluator>/<metric>' -> number.
    """
    lines = [f'# {title}', '', *(f'- `{name}`: {words}' for name, words in files.items()), '',
             '## Use', '', '```python', use.strip(), '```', '']
    lines += ['## Data', '', *_data(config, data), '']
    lines += ['## Channels and normalisation', '',
              f'Images are {_times(view.size)} pixels; values as stored, then minus the mean, divided by the standard '
              'deviation.', '', '| channel | mean | standard deviation |', '|---|---|---|',
              *(f'| {name} | {m:.6g} | {s:.6g} |' for name, m, s in zip(view.outputs, view.mean, view.std)), '']
    recipe = {k: v for k, v in config.items() if k not in _NOT_RECIPE}
    lines += ['## Recipe', '', '```json', json.dumps(recipe, indent=2), '```', '']
    lines += ['## Scores', '']
    if scores:
        lines += ['| score | value |', '|---|---|', *(f'| {k} | {v:.4g} |' for k, v in scores.items())]
    else:
        lines += ['None: the run has not been evaluated.']
    return '\n'.join(lines) + '\n'


_NOT_RECIPE = ('evals', 'checkpoint', 'mesh', 'wandb', 'log_every', 'health')


def _times(size: Sequence[int]) -> str:
    return ' x '.join(map(str, size))


def _data(config: Mapping[str, Any], data: Any) -> list[str]:
    if data is None:
        return [f'`{config["data"].get("root") or "unknown"}`, which was not there when this was written.']
    manifest = data.manifest
    lines = [f'{manifest.name}, split {data.split!r}; stored as {manifest.fields["image"].dtype}, '
             f'{_times(data.image_size)} pixels.', '',
             *(f'- {name}: {split.records:,} examples' for name, split in manifest.splits.items())]
    if manifest.classes:
        lines += [f'- classes: {", ".join(manifest.classes)}']
    source = {k: v for k, v in manifest.source.items() if isinstance(v, (str, int, float))}
    return lines + [f'- {k}: {v}' for k, v in source.items()]


def scores_of(run: str | pathlib.Path) -> dict[str, float]:
    """The last value of each score in a run's metrics.jsonl, then those of results.json and evaluation.json.

    Scores are the numbers with '/' in their names; training's own health is left out.
    """
    run, found = pathlib.Path(run), {}
    records = []
    if (run / 'metrics.jsonl').is_file():
        records += [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines() if line.strip()]
    records += [json.loads((run / name).read_text()) for name in ('results.json', 'evaluation.json')
                if (run / name).is_file()]
    for record in records:
        found |= {k: float(v) for k, v in record.items()
                  if '/' in k and not k.startswith('health/') and isinstance(v, (int, float)) and np.isfinite(v)}
    return found


def use(layout: str, file: str, encoder: Mapping[str, Any], size: tuple[int, int], channels: int,
        named: Mapping[str, np.ndarray]) -> str:
    """Code that loads exported weights, `named` by the layout, from `file`."""
    opens = (f"torch.load('{file}', weights_only=True)" if file.endswith('.pth') else
             f"safetensors.torch.load_file('{file}')")
    imports = 'import torch' if file.endswith('.pth') else 'import safetensors.torch'
    classes = len(named['head.weight']) if 'head.weight' in named else 0
    if layout == 'timm-vit':
        arguments = ', '.join(f'{k}={v!r}' for k, v in timm_arguments(encoder, tuple(size), channels, classes).items())
        layer = 'from timm.layers import SwiGLUPacked\n' if encoder.get('mlp') == 'swiglu' else ''
        extra = ', mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU' if layer else ''
        return (f'import timm\n{imports}\n{layer}model = timm.models.VisionTransformer({arguments}{extra})\n'
                f'model.load_state_dict({opens})')
    if layout == 'resnet' and encoder.get('stem', 'imagenet') == 'imagenet' and encoder.get('width', 64) == 64:
        outputs = len(named['fc.weight']) if 'fc.weight' in named else 0
        return (f"import timm\n{imports}\nmodel = timm.create_model('resnet{encoder['depth']}', in_chans={channels}, "
                f'num_classes={outputs})\nmodel.load_state_dict({opens})')
    if layout == 'hf-vit' and 'classifier.weight' in named:
        return ('from transformers import ViTForImageClassification\n'
                "model = ViTForImageClassification.from_pretrained('.')")
    if layout == 'hf-vit':
        return "from transformers import ViTModel\nmodel = ViTModel.from_pretrained('.', add_pooling_layer=False)"
    if layout == 'hf-vitmae':
        return "from transformers import ViTMAEForPreTraining\nmodel = ViTMAEForPreTraining.from_pretrained('.')"
    return f"from ssl_jax.weights import read\nweights = read('{file}')"
