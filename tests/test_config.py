import dataclasses
from collections.abc import Mapping
from typing import Literal

import ml_collections
import pytest

from ssl_jax import config
from ssl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Thing:
    size: int
    rate: float = 0.5
    kind: Literal['a', 'b'] = 'a'
    name: str | None = None
    shape: tuple[int, int] = (1, 2)
    weights: tuple[float, ...] = ()
    inner: Mapping[str, float] = dataclasses.field(default_factory=dict)
    on: bool = False


def test_bind_takes_well_typed_values():
    spec = ml_collections.ConfigDict(dict(size=3, rate=1, kind='b', name='x', shape=(4, 5), weights=[1, 2.5],
                                          inner=dict(a=1), on=True))
    thing = config.bind(Thing, spec, where='thing')()
    assert thing == Thing(3, 1, 'b', 'x', (4, 5), (1, 2.5), {'a': 1}, True)


@pytest.mark.parametrize('spec, message', [
    (dict(size=3, raet=1.0), r"config.thing.raet is not a key of Thing \(did you mean 'rate'\?\)"),
    (dict(size='3'), r"config.thing.size='3': expected int"),
    (dict(size=True), 'config.thing.size=True: expected int'),
    (dict(size=3, rate='x'), "config.thing.rate='x': expected float"),
    (dict(size=3, kind='c'), "config.thing.kind='c': expected one of 'a', 'b'"),
    (dict(size=3, name=4), 'config.thing.name=4: expected str or None'),
    (dict(size=3, shape=(1,)), r'config.thing.shape=\(1,\): expected tuple\[int, int\]'),
    (dict(size=3, weights=('a',)), 'config.thing.weights'),
    (dict(size=3, inner=dict(a='b')), 'config.thing.inner'),
    (dict(), 'config.thing.size is missing: Thing needs it'),
])
def test_bind_names_what_is_wrong(spec, message):
    with pytest.raises(UserError, match=message) as error:
        config.bind(Thing, spec, where='thing')
    assert '\n' not in str(error.value)


def test_context_fills_in_and_must_not_be_contradicted():
    assert config.bind(Thing, {}, where='thing', size=7, irrelevant=1)().size == 7
    with pytest.raises(UserError, match='config.thing.size=3: the run needs 7'):
        config.bind(Thing, dict(size=3), where='thing', size=7)


def test_resolve_names_the_nearest_plugin():
    with pytest.raises(UserError, match=r"config.objective.name='mea' is unknown \(did you mean 'mae'\?\)"):
        config.resolve('objectives', dict(name='mea'), where='objective')
    with pytest.raises(UserError, match='config.objective.name is missing: expected one of .*mae'):
        config.resolve('objectives', {}, where='objective')
    with pytest.raises(UserError, match='is unknown'):  # a module of the folder that is no plug-in
        config.resolve('models', dict(name='layers'), where='encoder')


@pytest.mark.parametrize('duration, expected',
                         [(5000, 5000), ('5000', 5000), ('40ep', 400), ('0.5ep', 5), ('10%', 100)])
def test_steps(duration, expected):
    assert config.steps(duration, where='x', steps_per_epoch=10, total_steps=1000) == expected


@pytest.mark.parametrize('duration', ['40 epochs', 'ep', '-3', '1.5', True, '10%'])
def test_steps_refuses(duration):
    with pytest.raises(UserError, match=r'config.duration=.*: expected a number of steps'):
        config.steps(duration, where='duration', steps_per_epoch=10)
