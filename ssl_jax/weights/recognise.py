"""Which layout a file has, from its names alone."""
import difflib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ssl_jax.errors import UserError, nearest
from ssl_jax.weights import layouts_hf, layouts_pets, layouts_resnet, layouts_vit
from ssl_jax.weights.layouts import Layout, respelt

# The first whose marks are all there is taken: what another one contains comes before it.
LAYOUTS = {layout.name: layout for layout in (
    *layouts_vit.DISTILLED, *layouts_vit.HEADS, layouts_resnet.MOCO, layouts_resnet.MOCO_V1, layouts_vit.MOCOV3,
    layouts_resnet.MOCOV3,
    layouts_resnet.SIMSIAM, layouts_pets.PETS_SEGMENT, layouts_pets.PETS_SIMMIM, layouts_pets.PETS, layouts_vit.SIMMIM,
    layouts_hf.HF_MAE, layouts_hf.HF, layouts_vit.MAE, layouts_vit.MAE_PROBE, layouts_vit.BEIT, layouts_vit.DINOV2,
    layouts_vit.TIMM, layouts_resnet.RESNET)}

# Where authors' files keep the weights, in the order in which they are looked for.
CONTAINERS = ('model', 'state_dict', 'model_state_dict')
# What else their files hold: of these nothing is ours.
OTHERS = {
    'optimizer': 'state of the optimiser', 'optim': 'state of the optimiser', 'scaler': 'scale of the loss',
    'fp16_scaler': 'scale of the loss', 'amp': 'scale of the loss', 'lr_scheduler': 'state of the schedule',
    'scheduler': 'state of the schedule', 'model_ema': 'an average of the weights',
    'state_dict_ema': 'an average of the weights',
    **dict.fromkeys(('epoch', 'iteration', 'step', 'args', 'arch', 'config', 'cfg', 'best_acc1', 'best_acc',
                     'max_accuracy', 'loss', 'metric', 'version', 'hyper_parameters'), 'a record of the run'),
}


class Unwrapped(NamedTuple):
    """Names as the tables have them -> names in the file, and names that hold no weights -> what they hold."""
    names: dict[str, str]
    others: dict[str, str]


def unwrap(names: Iterable[str]) -> Unwrapped:
    """Strips the container that weights are in and what wrappers put before their names.

    Of several containers the first of CONTAINERS is taken; averages beside it are left.
    """
    names = list(names)
    top = {name.partition('/')[0] for name in names if '/' in name}
    container = next((c for c in CONTAINERS if c in top), None)
    inside, others = {}, {}
    for name in names:
        first, slash, rest = name.partition('/')
        if first == container and slash:
            plain = rest
        elif first in OTHERS and (container or slash):
            others[name] = OTHERS[first]
            continue
        else:
            plain = name
        folder, slash, last = plain.rpartition('/')
        inside[folder + slash + re.sub(r'^(module\.|_orig_mod\.)+', '', last)] = name
    return Unwrapped(inside, others)


def recognise(names: Iterable[str], name: str | None = None) -> Layout:
    """The layout of a file with these names, as of `Unwrapped.names`.

    Args:
      name: of the layout, where it is known.
    Raises:
      UserError: no such layout, or none fits; with the nearest and what it lacks.
    """
    names = list(names)
    if name is not None:
        if name not in LAYOUTS:
            raise UserError(f'layout {name!r} is unknown{nearest(name, LAYOUTS)}')
        return LAYOUTS[name]
    for layout in LAYOUTS.values():
        if not _lacking(layout, names):
            return layout
    best = min(LAYOUTS.values(), key=lambda layout: len(_lacking(layout, names)) / len(layout.marks))
    shown = ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
    lacking = ' and '.join(mark.replace('\\', '') for mark in _lacking(best, names))
    raise UserError(f'no known layout has names like {shown}: {best.name} comes closest, and would need {lacking}')


def _lacking(layout: Layout, names: list[str]) -> list[str]:
    spelt = [respelt(layout, name) for name in names]
    return [mark for mark in layout.marks if not any(re.fullmatch(mark, name) for name in spelt)]


def similar(name: str, options: Iterable[str]) -> str:
    """A ' (did you mean ...?)' clause, or nothing."""
    close: Any = difflib.get_close_matches(name, list(options), n=1, cutoff=0.8)
    return f' (did you mean {close[0]!r}?)' if close else ''
