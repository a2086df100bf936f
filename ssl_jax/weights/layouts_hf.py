"""Layouts of Hugging Face's vision transformers, whose queries, keys and values are apart."""
from ssl_jax.weights.layouts import CONV, SAME, Fixed, Layout, Rule, dense, joined, norm
from ssl_jax.weights.layouts_vit import decoder_positions, whole_bias


def _hf_blocks(t, ours):
    attention, parts = f'{t}.attention', ('query', 'key', 'value')
    both = (lambda end: tuple(f'{attention}.attention.{part}.{end}' for part in parts))
    return [*norm(f'{t}.layernorm_before', f'{ours}/norm1'),
            Rule(both('weight'), f'{ours}/attn/qkv/kernel', joined(3, transpose=True)),
            Rule(both('bias'), f'{ours}/attn/qkv/bias', joined(3)),
            *dense(f'{attention}.output.dense', f'{ours}/attn/proj'),
            *norm(f'{t}.layernorm_after', f'{ours}/norm2'), *dense(f'{t}.intermediate.dense', f'{ours}/mlp/fc1'),
            *dense(f'{t}.output.dense', f'{ours}/mlp/fc2')]


_HF = [Rule('embeddings.cls_token', 'encoder/cls_token', SAME),
       Rule('embeddings.position_embeddings', 'encoder/pos_embed', SAME),
       Rule('embeddings.patch_embeddings.projection.weight', 'encoder/patch_embed/kernel', CONV),
       Rule('embeddings.patch_embeddings.projection.bias', 'encoder/patch_embed/bias', SAME),
       *_hf_blocks('encoder.layer.{i}', 'encoder/blocks'), *norm('layernorm', 'encoder/norm')]
# Since version 5 transformers spells names in memory in another way than in files.
_SPELLINGS = ((r'^vit\.', ''), (r'(^|\.decoder_)layers\.(\d+)\.', r'\1encoder.layer.\2.'),
              (r'\.attention\.([qkv])_proj\.', lambda m: '.attention.attention.{}.'.format(
                  {'q': 'query', 'k': 'key', 'v': 'value'}[m[1]])),
              (r'\.attention\.o_proj\.', '.attention.output.dense.'),
              (r'(layer\.\d+)\.mlp\.fc1\.', r'\1.intermediate.dense.'),
              (r'(layer\.\d+)\.mlp\.fc2\.', r'\1.output.dense.'))
_HF_UNUSED = ((r'pooler.dense.weight', 'pooler, no part of the encoder'),
              (r'pooler.dense.bias', 'pooler, no part of the encoder'),
              (r'embeddings.position_ids', 'numbers of positions'))
HF = Layout(
    'hf-vit', "Hugging Face's ViT", (*_HF, *dense('classifier', 'head/linear')),
    marks=(r'embeddings\.patch_embeddings\.projection\.weight',), unused=_HF_UNUSED, aliases=_SPELLINGS,
    encoder={'norm_eps': 1e-12}, objective='classify', before=whole_bias)
HF_MAE = Layout(
    'hf-vitmae', "Hugging Face's ViTMAE: encoder and decoder",
    (*_HF, *dense('decoder.decoder_embed', 'decoder/embed'), Rule('decoder.mask_token', 'decoder/mask_token', SAME),
     Fixed('decoder.decoder_pos_embed', 'decoder/embed/kernel', 'fixed positions of the decoder', decoder_positions),
     *_hf_blocks('decoder.decoder_encoder.layer.{i}', 'decoder/blocks'), *norm('decoder.decoder_norm', 'decoder/norm'),
     *dense('decoder.decoder_pred', 'decoder/pred')),
    marks=(r'embeddings\.patch_embeddings\.projection\.weight', r'decoder\.decoder_embed\.weight'),
    unused=_HF_UNUSED, aliases=_SPELLINGS, encoder={'norm_eps': 1e-12}, objective='mae', before=whole_bias)
