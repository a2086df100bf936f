"""MAE, ViT-L/16, ImageNet-1k: the recipe of He et al. 2022 (arXiv:2111.06377, appendix A.1, table 8).

python -m ssl_jax.main --config=configs/mae_vitl.py --config.data.root=DIR      (a converted folder, or tfds:imagenet2012)

Hardware: written for a TPU v3-128 pod, the paper's; smaller meshes need `--config.accumulate`.
Time: 31 hours for 800 epochs there (the paper, table 3, 1600 epochs in 1.3 days for the encoder without mask tokens).
Expected: 85.9 % top-1 after fine-tuning and 75.8 % (1600 epochs) linear probing (the paper, tables 3 and 13). Not run here.
"""
