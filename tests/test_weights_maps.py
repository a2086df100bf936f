"""Names of other projects to ours and back, and which of them a file has."""
import re

import golden_weights as golden
import jax
import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.weights.adopt import holds_weights
from ssl_jax.weights.convert import convert, settled, table
from ssl_jax.weights.encoders import encoder_of, positions
from ssl_jax.weights.export import contained, export, layout_for
from ssl_jax.weights.fit import adapt_channels, check, fit
from ssl_jax.weights.layouts import Rule, compiled, names_of, numbers_in, read_tree, write_tree
from ssl_jax.weights.recognise import LAYOUTS, recognise, unwrap

# Files of tests/golden, and their layouts.
GOLDEN = {'vit': 'timm-vit', 'mae_finetune': 'timm-vit', 'mae': 'mae', 'simmim': 'simmim', 'dino': 'dino',
          'ibot': 'ibot', 'moco': 'moco', 'mocov3': 'mocov3', 'simsiam': 'simsiam', 'resnet18': 'resnet',
          'resnet50': 'resnet', 'mim004_encoder': 'simmim-pets', 'mim004_simmim': 'simmim-pets-simmim'}


def load(name):
    weights = golden.load(f'{name}.safetensors')
    if name == 'mim004_simmim':
        encoder = golden.load('mim004_encoder.safetensors')
        weights |= {f'encoder.{k}': v for k, v in encoder.items() if not k.startswith('head')}
    return weights


def equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.mark.parametrize('name', GOLDEN)
def test_reference_files(name):
    """Recognised, read without a rest, and written as they were: names, shapes and every bit."""
    weights = load(name)
    imported = convert(weights)
    assert imported.layout.name == GOLDEN[name] and len(imported.found) == len(weights)
    named, homeless = write_tree(imported.layout, imported.tree)
    assert not homeless
    again, found = read_tree(imported.layout, named)
    assert not [row for row in found if row.problem]
    equal(imported.tree, again)
    # The bias that is folded away, counters of batches, and what the fixture left out because it is there twice.
    unlike = {'encoder.fc.6.bias', 'encoder.fc.7.running_mean'} if name == 'simsiam' else set()
    plain = {k: weights[v] for k, v in unwrap(weights).names.items()}
    extra = named.keys() - plain.keys()
    assert all(re.search('num_batches_tracked|last_layer2|get_patch_embedding', k) for k in extra)
    same = {k for k in plain if not k.endswith('num_batches_tracked')} - unlike
    equal({k: plain[k] for k in same}, {k: named[k] for k in same})


def generated(layout, size=2):
    """Weights by all names of a layout, of random values in shapes that the changes can take."""
    rng, weights = np.random.default_rng(0), {}
    for rule in layout.table:
        if isinstance(rule, Rule):
            last = rule.ours.rpartition('/')[2]
            shape = {'kernel': (4, 4), 'v': (4, 4)}.get(last, (4,))
            if rule.change.words == 'OIHW -> HWIO':
                shape = (4, 3, 2, 2)
            if 'pixel order' in rule.change.words or 'patches of pixels' in rule.change.words:
                shape = (12, 4) if last == 'kernel' else (12,)
                shape = (4, 12) if 'patches' in rule.change.words else shape
            shape = {'cls_token': (1, 1, 4), 'pos_embed': (1, 5, 4), 'registers': (1, 2, 4), 'mask_token': (1, 1, 4),
                     'g': (4, 1), 'queue': (4, 8), 'pointer': (1,), 'patch_center': (1, 1, 4), 'center': (1, 4),
                     'rel_pos_table': (12, 2)}.get(last, shape)
            if rule.ours == 'mask_token':   # (1, 1, D) in MAE and SimMIM, (1, D) or (D,) elsewhere
                shape = rule.change.write(np.zeros((1, 1, 4)), None)[0].shape
            for name in names_of(rule):
                for i in range(size if len(numbers_in(name)) else 1):
                    numbers = dict.fromkeys(numbers_in(name), 1) | dict.fromkeys(
                        [k for k in numbers_in(name) if k not in numbers_in(rule.ours)], i)
                    weights[name.format(**numbers)] = rng.normal(size=shape).astype(np.float32)
    return weights


@pytest.mark.parametrize('name', LAYOUTS)
def test_every_rule_there_and_back(name):
    """Every rule of every table is its own inverse; a tree that was read is read again to the last bit."""
    layout = LAYOUTS[name]
    tree, found = read_tree(layout, generated(layout))
    assert tree and not [row for row in found if row.problem]
    named, homeless = write_tree(layout, tree)
    assert not homeless
    equal(tree, read_tree(layout, named)[0])


def test_every_mark_is_a_name_of_its_table():
    for layout in LAYOUTS.values():
        patterns = [compiled(n) for rule in layout.table if isinstance(rule, Rule) for n in names_of(rule)]
        examples = generated(layout)
        for mark in layout.marks:
            readable = mark.replace('\\', '').replace('(student|teacher)', 'student').replace('blocks.0', 'blocks.1')
            hits = [p for p in patterns if p.fullmatch(readable.replace('layers.0', 'layers.1'))]
            assert hits or any(re.fullmatch(mark, n) for n in examples), (layout.name, mark)


@pytest.mark.parametrize('names, expected', [
    (['model/encoder.mask_token', 'model/encoder.blocks.0.attn.qkv.weight', 'optimizer/state/0/exp_avg'], 'simmim'),
    (['state_dict/module.encoder_q.conv1.weight', 'state_dict/module.encoder_q.fc.weight'], 'moco-v1'),
    (['state_dict/module.base_encoder.conv1.weight'], 'mocov3-resnet'),
    (['student/module.backbone.blocks.0.attn.qkv.weight', 'student/module.head.mlp.1.running_mean'], 'dino-bn'),
    (['mask_token', 'blocks.0.ls1.gamma', 'patch_embed.proj.weight', 'blocks.0.attn.qkv.weight'], 'dinov2'),
    (['vit.embeddings.patch_embeddings.projection.weight', 'classifier.weight'], 'hf-vit'),
    (['vit.embeddings.patch_embeddings.projection.weight', 'decoder.decoder_embed.weight'], 'hf-vitmae'),
    (['blocks.0.attn.q_bias', 'patch_embed.proj.weight', 'blocks.0.attn.qkv.weight'], 'simmim-finetune'),
    (['blocks.0.attn.qkv.weight', 'head.1.weight', 'head.0.running_mean', 'patch_embed.proj.weight'], 'mae-probe'),
    (['_orig_mod.conv1.weight', '_orig_mod.layer1.0.conv1.weight'], 'resnet')])
def test_recognised_by_names(names, expected):
    assert recognise(unwrap(names).names).name == expected


def test_problems_are_named():
    weights = load('vit')
    with pytest.raises(UserError, match=r'timm-vit.*problem with block.2.norm1.weight \(48,\) \(no place.*blocks'):
        convert({k.replace('blocks.2.norm1.weight', 'block.2.norm1.weight'): v for k, v in weights.items()})
    with pytest.raises(UserError, match=r'problem with dist_token \(1, 1, 48\) \(no place for it\)'):
        convert(weights | {'dist_token': np.zeros((1, 1, 48))})
    assert 'dist_token' in table(convert(weights | {'dist_token': np.zeros((1, 1, 48))}, ignore=('dist_*',)))
    with pytest.raises(UserError, match=r'blocks.0.norm1.bias \(48,\) \(layer 1 of it is missing\), blocks.2'):
        convert({k: v for k, v in weights.items() if k != 'blocks.1.norm1.bias'})
    with pytest.raises(UserError, match=r'it lacks norm.bias, encoder/norm/bias \(48,\) of ours'):
        convert({k: v for k, v in weights.items() if k != 'norm.bias'})
    with pytest.raises(UserError, match=r'not the usual index of relative positions'):
        weights = load('simmim')
        index = weights['encoder.rel_pos_bias.relative_position_index']
        convert(weights | {'encoder.rel_pos_bias.relative_position_index': index.T})
    with pytest.raises(UserError, match='no known layout has names like encoder.weight'):
        convert({'encoder.weight': np.zeros(3)})


def test_the_file_says_what_the_encoder_is():
    expect = {
        'vit': dict(width=48, depth=3, patch=8, pos='learned'),
        'mae': dict(pos='sincos'), 'mocov3': dict(pos='sincos_rows'),
        'simmim': dict(pos='relative', qkv_bias='qv', heads=3, layer_scale=1e-5),
        'mim004_encoder': dict(qkv_bias=False, patch_norm=True, norm_eps=1e-5, mlp_ratio=2.0),
        'resnet50': dict(name='resnet', depth=50, width=6)}
    for name, options in expect.items():
        imported = convert(load(name))
        assert options.items() <= imported.encoder.spec.items(), (name, imported.encoder.spec)
        kept = 'encoder/pos_embed' in settled(imported)
        assert kept == (options.get('pos') == 'learned' or name == 'mim004_encoder'), name
    assert 'size' in encoder_of({'encoder/patch_embed/kernel': np.zeros((16, 16, 3, 192)),
                                 'encoder/blocks/attn/qkv/kernel': np.zeros((12, 192, 576)),
                                 'encoder/blocks/mlp/fc1/kernel': np.zeros((12, 192, 768)),
                                 'encoder/blocks/mlp/fc2/kernel': np.zeros((12, 768, 192))}).spec


def test_configs_that_differ_are_told_what_to_set():
    found = convert(load('vit')).encoder
    fits = dict(name='vit', width=48, depth=3, heads=3, patch=8, pos='learned')
    assert not check(found, fits)
    with pytest.raises(UserError, match=r'depth=3 \(not 2\), norm_eps=1e-06 \(not 1e-05\), registers=0 \(not 1\)'):
        check(found, fits | dict(depth=2, norm_eps=1e-5, registers=1))
    assert not check(found, fits | dict(norm_eps=1e-5), ignore=('norm_eps',))
    with pytest.raises(UserError, match=r"expected config.objective.encoder.name='vit', found 'resnet'"):
        check(found, dict(name='resnet', depth=18))
    heads = convert(load('vit'), {'heads': 4}).encoder
    with pytest.raises(UserError, match=r'set heads=4 \(not 3\)'):
        check(heads, fits)


def encoder_arrays(name):
    return {k.removeprefix('encoder/'): v for k, v in convert(load(name)).tree.items() if k.startswith('encoder/')}


def test_fit():
    x = encoder_arrays('vit')
    shapes = {k: v.shape for k, v in x.items()}
    smaller = fit(x, shapes | {'pos_embed': (1, 10, 48)}, pos_resize='torch')
    expected = golden.load('vit_pos_embed.npz')['mae/pos_3']
    golden.assert_golden('vit_pos_embed', 'mae/pos_3', smaller.tree['pos_embed'], expected)
    assert smaller.notes == {'pos_embed': "resized from 4x4 to 3x3 (rule 'torch')"}
    antialiased = fit(x, shapes | {'pos_embed': (1, 37, 48)}, pos_resize='antialias').tree['pos_embed']
    golden.assert_golden('vit_pos_embed', 'timm/pos_6x6', antialiased, golden.load('vit_pos_embed.npz')['timm/pos_6x6'])

    with pytest.raises(UserError, match="3 channels, this run 2: expected channels='mean' or 'repeat' or 'sum'"):
        fit(x, shapes | {'patch_embed/kernel': (8, 8, 2, 48)})
    two = fit(x, shapes | {'patch_embed/kernel': (8, 8, 2, 48)}, channels='repeat').tree['patch_embed/kernel']
    np.testing.assert_array_equal(two, x['patch_embed/kernel'][:, :, :2])
    with pytest.raises(UserError, match=r'lacks registers \(1, 4, 48\)'):
        fit(x, shapes | {'registers': (1, 4, 48)})
    with pytest.raises(UserError, match='holds cls_token'):
        fit(x, {k: v for k, v in shapes.items() if k != 'cls_token'})
    bare = {k: v for k, v in shapes.items() if k != 'cls_token'} | {'pos_embed': (1, 16, 48)}
    np.testing.assert_array_equal(fit(x, bare, ignore=('cls_token',)).tree['pos_embed'], x['pos_embed'][:, 1:])
    with pytest.raises(UserError, match="positions are learned: expected config.objective.encoder.pos='learned'"):
        fit(x, {k: v for k, v in shapes.items() if k != 'pos_embed'})
    fixed = encoder_arrays('mae')
    assert 'computed' in fit(fixed, {k: v.shape for k, v in fixed.items() if k != 'pos_embed'}).notes['pos_embed']


def test_fit_of_relative_positions_and_biases():
    x = encoder_arrays('simmim')
    wanted = {k: v.shape for k, v in x.items() if k != 'rel_pos_table'} | {'blocks/attn/rel_pos_table': (3, 228, 3)}
    each = fit(x, wanted).tree['blocks/attn/rel_pos_table']
    expected = golden.load('simmim_finetune.npz')['table_resized']
    for table_of_block in each:
        golden.assert_golden('simmim_finetune', 'table_resized', table_of_block, expected)
    q, v, whole = 'blocks/attn/q_bias', 'blocks/attn/v_bias', 'blocks/attn/qkv/bias'
    one = fit(x, {k: a.shape for k, a in x.items() if k not in (q, v)} | {whole: (3, 144)}).tree
    back = fit(one, {k: a.shape for k, a in x.items()}).tree
    equal(back, x)
    one[whole] = one[whole] + 1
    with pytest.raises(UserError, match='keys have a bias'):
        fit(one, {k: a.shape for k, a in x.items()})


def test_adapt_channels():
    kernel = np.random.default_rng(0).normal(size=(2, 2, 3, 5))
    np.testing.assert_array_equal(adapt_channels(kernel, 4, 'repeat'), kernel[:, :, [0, 1, 2, 0]])
    np.testing.assert_allclose(adapt_channels(kernel, 2, 'mean')[:, :, 1], kernel.mean(2))
    for count in (1, 3, 6):
        np.testing.assert_allclose(adapt_channels(kernel, count, 'sum').sum(2), kernel.sum(2))


def test_exports_are_read_again():
    """The encoder of an MAE with its computed positions, and with its decoder, by all names that can say it."""
    imported = convert(load('mae'), {'heads': 3})
    tree, spec = settled(imported), imported.encoder.spec
    own = {k: v for k, v in tree.items() if k.startswith('encoder/')}
    for name, parts, options in (('timm', 'encoder', {'heads': 3}), ('hf', 'encoder', {'heads': 3, 'norm_eps': 1e-6}),
                                 ('mae', 'all', {'heads': 3}), ('hf-vitmae', 'all', {'heads': 3, 'norm_eps': 1e-6})):
        named = export(tree, spec, (32, 32), layout_for(name, spec), parts=parts)
        back = convert(named, options)
        assert back.encoder.spec == spec, name
        equal(settled(back), own if parts == 'encoder' else tree)
    assert contained({'student/a': 1}, LAYOUTS['dino'], 'all') == {'student': {'a': 1}}
    assert positions(spec, (32, 32)).shape == (1, 17, 48)
    with pytest.raises(UserError, match=r'layout hf-vit has no registers=4: expected 0'):
        export(tree, spec | dict(registers=4), (32, 32), layout_for('hf', spec))
    with pytest.raises(UserError, match=r'layout timm-vit has no name for decoder/'):
        export(tree, spec, (32, 32), layout_for('timm', spec), parts='all')


def test_exports_of_teachers():
    tree = convert(load('dino')).tree
    spec = encoder_of(tree, {'heads': 3}).spec
    teacher = export(tree, spec, (32, 32), layout_for('timm', spec), network='teacher')
    weights = load('dino')
    equal(teacher, {k.removeprefix('teacher/backbone.'): v for k, v in weights.items()
                    if k.startswith('teacher/backbone.')})
    with pytest.raises(UserError, match=r"no network 'momentum' with an encoder: expected one of \['teacher'\]"):
        export(tree, spec, (32, 32), layout_for('timm', spec), network='momentum')
    stats = {'momentum/encoder/bn1/scale': np.ones(2), 'momentum_stats/encoder/bn1/mean': np.ones(2)}
    named = export(stats, dict(name='resnet', depth=18), (32, 32), LAYOUTS['resnet'], network='momentum')
    assert named.keys() == {'bn1.weight', 'bn1.running_mean', 'bn1.num_batches_tracked'}


def test_tokens_and_positions_of_timm():
    """timm keeps no position for the class token where there are registers, or adds those of registers to them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    cls, registers = draw(1, 1, 4), draw(1, 4, 4)
    read = lambda pos: read_tree(LAYOUTS['timm-vit'], {'cls_token': cls, 'reg_token': registers, 'pos_embed': pos})[0]
    bare = draw(1, 9, 4)
    tree = read(bare)
    assert not tree['encoder/pos_embed'][:, :1].any()
    np.testing.assert_array_equal(write_tree(LAYOUTS['timm-vit'], tree)[0]['pos_embed'], bare)
    full = draw(1, 14, 4)
    tree = read(full)
    np.testing.assert_array_equal(tree['encoder/registers'], registers + full[:, 1:5])
    np.testing.assert_array_equal(tree['encoder/pos_embed'], full[:, [0, *range(5, 14)]])
    named = write_tree(LAYOUTS['timm-vit'], tree)[0]
    np.testing.assert_array_equal(named['cls_token'], cls + full[:, :1])


def test_what_counts_as_a_file(tmp_path):
    (tmp_path / 'model.safetensors').write_bytes(b'')
    assert holds_weights(tmp_path) and holds_weights('https://x.org/a.pth') and holds_weights(tmp_path / 'b.pth.tar')
    assert not holds_weights(tmp_path / 'run') and not holds_weights(str(tmp_path.parent))


def test_layers_of_a_stack_keep_their_order():
    weights = {f'blocks.{i}.norm1.bias': np.full(2, i, np.float32) for i in (10, 2, 0, 1, *range(3, 10))}
    tree, _ = read_tree(LAYOUTS['timm-vit'], weights)
    np.testing.assert_array_equal(tree['encoder/blocks/norm1/bias'][:, 0], np.arange(11))
    jax.tree.map(np.testing.assert_array_equal, write_tree(LAYOUTS['timm-vit'], tree)[0], weights)
