"""The pictures of a run inside the page: as many as fit, the newest first, earlier steps to choose from."""
import base64
import io
import pathlib
from collections.abc import Sequence

import numpy as np

from ssl_jax.tools.report_html import Html, join, note, tag
from ssl_jax.tools.report_read import Run

BUDGET = 5_000_000      # bytes of all pictures of a page
STEPS = 6               # of one evaluator: the latest and earlier ones, evenly spread
PER_STEP = 12
WIDEST = 1600           # pixels
HEAVY = 150_000         # bytes of a PNG from which it is stored as JPEG


class Budget:
    """What is left for pictures, and how many found no room."""

    def __init__(self, size: int = BUDGET):
        self.left, self.refused = size, 0

    def load(self, path: pathlib.Path) -> str | None:
        """A picture file as a data URI, or None if it cannot be read or there is no room for it."""
        try:
            uri = _uri(path)
        except (OSError, ValueError, SyntaxError):   # what PIL raises for a cut-off file, by format
            return None
        if uri is None or len(uri) > self.left:
            self.refused += 1
            return None
        self.left -= len(uri)
        return uri


def embed(picture: np.ndarray) -> str:
    """(H, W) or (H, W, 3) uint8 as a data URI."""
    from PIL import Image
    return _encode(Image.fromarray(picture))


def _uri(path: pathlib.Path) -> str | None:
    from PIL import Image
    stored = path.read_bytes()
    with Image.open(io.BytesIO(stored)) as image:
        image.load()
        if image.width <= WIDEST and len(stored) <= HEAVY and image.format == 'PNG':
            return f'data:image/png;base64,{base64.b64encode(stored).decode()}'
        image = image.convert('RGB')
        if image.width > WIDEST:
            image = image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))))
        return _encode(image)


def _encode(image) -> str:
    """As PNG, or as JPEG where that is much smaller."""
    file = io.BytesIO()
    image.save(file, 'PNG', optimize=True)
    kind = 'png'
    if file.tell() > HEAVY:
        file, kind = io.BytesIO(), 'jpeg'
        image.convert('RGB').save(file, 'JPEG', quality=88, subsampling=0)
    return f'data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}'


def found(run: Run) -> dict[str, dict[int, list[pathlib.Path]]]:
    """Picture files by evaluator and step."""
    folder, tags = run.path / 'images', {}
    for path in sorted(folder.rglob('*.png')):
        name, step = path.parent.relative_to(folder).as_posix(), path.name.partition('_')[0]
        if step.isdecimal():
            tags.setdefault(name, {}).setdefault(int(step), []).append(path)
    return tags


def gallery(runs: Sequence[Run], budget: Budget) -> Html:
    """The pictures of every run and evaluator."""
    wanted, count = [], {}
    for k, run in enumerate(runs):
        for name, steps in found(run).items():
            known = sorted(steps)
            chosen = {known[round(i)] for i in np.linspace(0, len(known) - 1, min(STEPS, len(known)))}
            count[k, name] = (len(known), max(map(len, steps.values())))
            wanted += [(rank, k, name, step, steps[step][:PER_STEP])
                       for rank, step in enumerate(sorted(chosen, reverse=True))]
    loaded = {}
    for _, k, name, step, paths in sorted(wanted, key=lambda w: w[:2]):   # the latest step of all before earlier ones
        pictures = [(p.stem.partition('_')[2], uri) for p in paths if (uri := budget.load(p))]
        if pictures:
            loaded.setdefault((k, name), {})[step] = pictures
    parts = [_one(runs, k, name, steps, count[k, name]) for (k, name), steps in sorted(loaded.items())]
    bare = [run.name for k, run in enumerate(runs) if not any(k == key for key, _ in loaded)]
    if bare:
        parts.append(note(f'No pictures: {", ".join(bare)}. The evaluators reconstruct and segmentation draw some.'))
    if budget.refused:
        parts.append(note(f'{budget.refused} pictures are left out to keep this file small; they are in RUN/images.'))
    return join(parts)


def _one(runs: Sequence[Run], k: int, name: str, steps: dict[int, list[tuple[str, str]]],
         count: tuple[int, int]) -> Html:
    """One evaluator: the latest step is shown, buttons bring back earlier ones."""
    known = sorted(steps)
    shown = []
    for step in known:
        figures = [tag('figure', tag('img', src=uri, alt=title, loading='lazy'), tag('figcaption', title))
                   for title, uri in steps[step]]
        class_ = 'pictures many' if len(figures) > 1 else 'pictures'
        shown.append(tag('div', *figures, class_=class_, data_step=step, hidden=step != known[-1]))
    pressed = lambda step: 'true' if step == known[-1] else 'false'
    buttons = [tag('button', f'{step:,}', type='button', data_step=step, aria_pressed=pressed(step)) for step in known]
    bar = tag('p', tag('span', 'step ', class_='faint'), *buttons, class_='steps') if len(known) > 1 else (
        note(f'Step {known[0]:,}.'))
    left = [f'{count[0] - len(known)} more steps'] * (count[0] > len(known))
    left += [f'{count[1] - PER_STEP} more pictures of each step'] * (count[1] > PER_STEP)
    rest = note(f'{" and ".join(left)} in {runs[k].path / "images" / name}') if left else ''
    title = join((f'{runs[k].name}: ' * (len(runs) > 1), name))
    return join((tag('h3', title), tag('div', bar, *shown, class_='gallery'), rest))


def views(runs: Sequence[Run], budget: Budget) -> Html:
    """The first augmented batch, where a dry run has drawn it."""
    parts, bare = [], []
    for run in runs:
        uri = budget.load(run.path / 'views.png') if (run.path / 'views.png').is_file() else None
        if uri is None:
            bare.append(run.name)
            continue
        picture = tag('div', tag('figure', tag('img', src=uri, alt='augmented views')), class_='pictures')
        parts += [tag('h3', run.name) if len(runs) > 1 else '', picture]
    if bare:
        command = 'python -m ssl_jax.main --config=... --workdir=RUN --dry_run'
        parts.append(note(join(('Not drawn for ', ', '.join(bare), ': ', tag('code', command),
                                ' draws the first augmented batch as RUN/views.png.'))))
    return join(parts)
