"""One random view of one example: what every view is built from."""
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.step import Batch
from ssl_jax.views import curves, ops, randaugment
from ssl_jax.views.draws import Draws
from ssl_jax.views.recipe import Recipe
from ssl_jax.views.warp import (
    Warp,
    central_box,
    random_box,
    sample,
    sample_nearest,
    spline_displacement,
    spline_knots,
    warp,
    warp_nearest,
)

Example = Mapping[str, jax.Array]


class Augment(Recipe):
    """Carries out a `Recipe` on one example; and `eval` on a batch, which is the same for every view."""

    def eval(self, batch: Batch) -> Batch:
        """Resized, centre-cropped and normalised: 'image' (B, h, w, C) float32 and the batch's other fields."""
        return jax.vmap(self.central)(dict(batch))

    def random(self, example: Example, key: jax.Array) -> dict[str, jax.Array]:
        """An augmented view of one example.

        Args:
          example: 'image' (H, W, C) of any dtype; optionally 'valid' (H, W, 1 or C) bool, 'label_map' (H, W); other
            fields are passed on.
        Returns:
          'image' (h, w, outputs) float32, normalised; 'valid' (h, w, 1 or outputs) if it was there, the rotation's
          border is 'zero' or there is randaugment; 'label_map' (h, w) of nearest pixels, 0 outside the canvas.
        """
        drawn = Draws(key, len(self.channels), len(self.phases.wrapped))
        geometry = self._geometry(example['image'].shape[:2], drawn)
        x, valid, out = self._warped(example, geometry, **self._reach)
        unit, clamp = self._unit(example['image'].dtype)
        if self.randaugment:
            x, valid = self._randaugmented(x, valid, out, drawn, unit, clamp)
        if self.jitter:
            x = self._on_linear(x, lambda x: self._jittered(x, valid, drawn, clamp), unit)
        if self.grey:
            x = self._on_linear(x, lambda x: jnp.where(drawn.happens('grey', self.grey), ops.grey(x), x))
        if self.blur:
            x = self._blurred(x, valid, drawn)
        if self.solarise:
            inverted = drawn.happens('solarise', self.solarise.probability)
            x = self._on_linear(x, lambda x: jnp.where(inverted, ops.solarise(x, self.solarise.threshold), x), unit)
        x, cycles = self._noisy(x, drawn, unit if clamp else None)
        if self.phase:
            amplitude = np.float32([self.phase.offset, self.phase.ramp, self.phase.ramp])[:, None]
            amplitude = jnp.where(drawn.happens('phase', self.phase.probability), amplitude, 0)
            cycles += ops.plane(self.size, *(amplitude * (2 * drawn['plane'] - 1)))
        out |= self._normalised(x, valid, cycles)
        if self.cutout:
            cut = ops.rectangles(drawn.uniform('cutout', (4, self.cutout.count)), self.size, self.cutout.size)
            cut &= drawn.happens('cutout', self.cutout.probability)
            out['image'] = jnp.where(cut[..., None], 0, out['image'])
        if self.erasing:
            box = random_box(drawn.uniform('erasing', (22,)), self.size, self.erasing.area, self.erasing.ratio)
            erased = ops.box(box, self.size) & drawn.happens('erasing', self.erasing.probability)
            noise = drawn.normal('erasing_noise', out['image'].shape)
            out['image'] = jnp.where(erased[..., None], noise, out['image'])
        return out

    def central(self, example: Example) -> dict[str, jax.Array]:
        """The deterministic view of one example: resized, centre-cropped and normalised. See `random`."""
        x, valid, out = self._warped(example, self._central(example['image'].shape[:2]), beyond=True)
        return out | self._normalised(x, valid)

    def _central(self, source: tuple[int, int]) -> Warp | None:
        """None where the view is the canvas itself."""
        box = central_box(source, self.size, self.resize)
        return None if box == (0, 0, *source) and source == self.size else Warp(*box)

    def _geometry(self, source: tuple[int, int], drawn: Draws) -> Warp | None:
        geometry = self._central(source)
        if not (self.crop or self.hflip or self.vflip or self.quarter_turns or self.rotation or self.elastic):
            return geometry
        box = (0, 0, *source) if geometry is None else geometry[:4]
        if self.crop:
            random = random_box(drawn['box'], source, self.crop.scale, self.crop.ratio)
            box = [jnp.where(drawn.happens('crop', self.crop.probability), r, b) for r, b in zip(random, box)]
        geometry = Warp(*box, flip_rows=drawn.happens('vflip', self.vflip),
                        flip_columns=drawn.happens('hflip', self.hflip))
        if self.quarter_turns:
            turns = 1 + jnp.floor(3 * drawn['turns']).astype(jnp.int32)
            geometry = geometry.turned(jnp.where(drawn.happens('quarter_turns', self.quarter_turns), turns, 0))
        if self.rotation:
            degrees = drawn.between('degrees', -self.rotation.degrees, self.rotation.degrees)
            rotated = drawn.happens('rotation', self.rotation.probability)
            geometry = geometry._replace(degrees=jnp.where(rotated, degrees, 0.0))
        if self.elastic:
            spacing = self.elastic.smoothness
            knots = drawn.uniform('elastic', (2, *spline_knots(self.size, spacing)))
            amplitude = jnp.where(drawn.happens('elastic', self.elastic.probability), self.elastic.amplitude, 0.0)
            geometry = geometry._replace(displacement=spline_displacement(knots, self.size, amplitude, spacing))
        return geometry

    @property
    def _reach(self) -> dict[str, Any]:
        """How far the pixels of a random view are moved at most, and what comes in at its border: see `warp`."""
        reach = dict(reach=self.rotation.degrees, border=self.rotation.border) if self.rotation else {}
        return dict(give=self.elastic.amplitude, border='reflect') | reach if self.elastic else reach

    def _warped(self, example: Example, geometry: Warp | None, *, beyond: bool = False, **reach: Any):
        """The encoded image, its validity or None, and the other fields."""
        out = dict(example)
        image, valid = out.pop('image'), out.pop('valid', None)
        if image.shape[-1] != len(self.channels):
            raise UserError(f'images have {image.shape[-1]} channels, the manifest names {len(self.channels)}')
        if valid is not None and self.mixes:
            valid = jnp.broadcast_to(valid.all(-1, keepdims=True), valid.shape)
        x = self._curved(self.phases.encode(image))
        if geometry is None:
            return x, valid, out
        if valid is None and reach.get('border') == 'zero':
            valid = jnp.ones((*image.shape[:2], 1), bool)
        move = functools.partial(warp, geometry=geometry, size=self.size, method=self.interpolation,
                                 antialias=self.antialias, beyond=beyond, **reach)
        x, share = self._averaged(move, x, valid)
        if valid is not None:
            valid = share >= 0.5
            x = jnp.where(self.phases.spread(valid), x, 0)
        if 'label_map' in out:
            out['label_map'] = warp_nearest(out['label_map'], geometry, self.size, **reach)
        unit, clamp = self._unit(image.dtype)
        if clamp:   # bicubic interpolation overshoots at edges
            x = self._on_linear(x, lambda x: jnp.clip(x, 0, unit))
        return x, valid, out

    def _averaged(self, linear: Callable[[jax.Array], jax.Array], x: jax.Array, valid: jax.Array | None):
        """A linear filter of the valid pixels alone, and the share of its weight that they carry (h, w, 1 or C)."""
        if valid is None:
            return linear(x), None
        count = x.shape[-1]
        x = jnp.where(self.phases.spread(valid), x, 0)
        parts = linear(jnp.concatenate([x, valid.astype(jnp.float32)], -1))
        share = parts[..., count:]
        return parts[..., :count] / self.phases.spread(jnp.where(share > 0, share, 1)), share

    def _curved(self, x: jax.Array) -> jax.Array:
        """The encoded image with the transforms of its linear channels made."""
        if not self.curves:
            return x
        linear = [self.curves.get(i) for i in self.phases.order[:self.phases.linear].tolist()]
        return self._on_linear(x, lambda x: curves.apply(x, linear))

    def _unit(self, dtype) -> tuple[float | np.ndarray, bool]:
        """What the linear channels are divided by for colour operations, and whether they lie in [0, 1] then."""
        stored = float(jnp.iinfo(dtype).max) if jnp.issubdtype(dtype, jnp.unsignedinteger) else None
        rescaled = {i for i, curve in self.curves.items() if curve.transform.rescales}
        limits = {c.name: (0.0, 1.0) if stored and i not in rescaled else
                  self.curves[i].limits if i in self.curves else (c.minimum, c.maximum)
                  for i, c in enumerate(self.channels) if c.kind == 'linear'}
        outside = [(name, low, high) for name, (low, high) in limits.items() if not 0 <= low <= high <= 1]
        colours = self.randaugment and self.randaugment.ops == 'all'
        if outside and (self.solarise or colours or (self.jitter and self.jitter.hue)):
            name, low, high = outside[0]
            raise UserError('config.view: hue, solarise and the colours of randaugment need unsigned integers or '
                            f'values in [0, 1], channel {name!r} is {jnp.dtype(dtype)} in [{low}, {high}]')
        if not stored or not rescaled:
            return stored or 1.0, not outside
        units = [1.0 if i in rescaled else stored for i in self.phases.order[:self.phases.linear]]
        return np.float32(units), not outside

    def _randaugmented(self, x: jax.Array, valid: jax.Array | None, out: dict[str, jax.Array], drawn: Draws,
                       unit: float | np.ndarray, clamp: bool):
        """Image and validity, and in `out` the label map, after randaugment."""
        option = self.randaugment
        slots = randaugment.draw(drawn.uniform('randaugment', (4, option.n)), option)
        if option.ops == 'all':
            x = self._on_linear(x, lambda x: randaugment.colour(x, slots, valid), unit)
        places = randaugment.places(slots, self.size)
        valid = jnp.ones((*self.size, 1), bool) if valid is None else valid
        x, share = self._averaged(lambda x: sample(x, *places, self.interpolation), x, valid)
        x = self._on_linear(x, lambda x: jnp.clip(x, 0, unit)) if clamp else x
        if 'label_map' in out:
            out['label_map'] = sample_nearest(out['label_map'], *places)
        return x, share >= 0.5

    def _on_linear(self, x: jax.Array, function: Callable[[jax.Array], jax.Array], unit: float = 1.0) -> jax.Array:
        count = self.phases.linear
        return jnp.concatenate([function(x[..., :count] / unit) * unit, x[..., count:]], -1)

    def _jittered(self, x: jax.Array, valid: jax.Array | None, drawn: Draws, clamp: bool) -> jax.Array:
        low, high = np.asarray(self.jitter.ranges, np.float32).T[..., None]
        neutral = np.asarray([1, 1, 1, 0], np.float32)[:len(low), None]
        factors = low + (high - low) * drawn['factors'][:len(low), :1 if self.rgb else x.shape[-1]]
        factors = jnp.where(drawn.happens('jitter', self.jitter.probability), factors, neutral)
        if valid is not None:
            valid = self.phases.spread(valid)[..., :self.phases.linear]
        order = jnp.argsort(drawn['order'][:len(low)])
        return ops.jitter(x, order, factors, rgb=self.rgb, valid=valid, clamp=clamp)

    def _blurred(self, x: jax.Array, valid: jax.Array | None, drawn: Draws) -> jax.Array:
        names = 'sigma_rows', 'sigma_columns'
        sigmas = [drawn.between(name, *limits) for name, limits in zip(names, self.blur.ranges)]
        soften = functools.partial(ops.blur, sigma=(sigmas[0], sigmas[-1]), kernel=self.blur.kernel)
        return jnp.where(drawn.happens('blur', self.blur.probability), self._averaged(soften, x, valid)[0], x)

    def _noisy(self, x: jax.Array, drawn: Draws, limit: float | None):
        """Speckle and noise: the linear channels with it, and cycles (h, w, phases) to be added to the phases."""
        def normal(name, option, count):
            sigma = drawn.between(f'{name}_sigma', *option.sigma) * drawn.happens(name, option.probability)
            return sigma * drawn.normal(name, (*self.size, count))

        linear, cycles = self.phases.linear, 0.0
        if self.speckle:
            x = self._on_linear(x, lambda x: x * (1 + normal('speckle', self.speckle, linear)))
        if self.noise:
            std = self.deviations[self.phases.order[:len(self.channels)]]
            noise = std * normal('noise', self.noise, len(std))
            x = self._on_linear(x, lambda x: x + noise[..., :linear])
            cycles = noise[..., linear:] / self.phases.period
        if (self.speckle or self.noise) and limit is not None:
            x = self._on_linear(x, lambda x: jnp.clip(x, 0, limit))
        return x, cycles

    def _normalised(self, x: jax.Array, valid: jax.Array | None, cycles: jax.Array | float = 0.0):
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        image = ops.normalise(self.phases.decode(x, cycles), mean, std)
        if valid is None:
            return {'image': image}
        if valid.shape[-1] > 1 and self.phases.paired:
            valid = valid[..., self.phases.sources]
        return {'image': jnp.where(valid, image, 0), 'valid': valid}
