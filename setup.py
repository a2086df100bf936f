from setuptools import find_packages, setup

# What converters read, each through its own library.
FORMATS = {
    'hdf5': ['h5py>=3.11'],            # netCDF 4 is HDF5 too
    'netcdf': ['scipy>=1.13'],         # classic netCDF
    'fits': ['astropy>=6.1'],
    'geotiff': ['rasterio>=1.4'],
    'parquet': ['pyarrow>=17'],
}

setup(
    name='ssl_jax',
    version='0.1.0',
    description='Self-supervised learning for scientific and natural images in JAX/Flax',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['ssl_jax', 'ssl_jax.*', 'data_prep', 'data_prep.*', 'launch']),
    package_data={'launch': ['*.sbatch', '*.sh', '*.yaml'], 'ssl_jax.tools': ['*.css', '*.html', '*.js']},
    install_requires=[
        'jax>=0.10', 'flax>=0.12.8', 'optax>=0.2.8', 'orbax-checkpoint>=0.12.8', 'ml_collections>=1.1', 'grain>=0.2.18',
        'zarr>=3.1.3', 'tensorflow-datasets>=4.9.10', 'clu>=0.0.12', 'numpy>=2.0', 'absl-py>=2.1',
        'array_record>=0.8',        # the record files that grain reads; not on Windows
        'importlib_resources>=6',   # tensorflow-datasets needs it to prepare a data set, and does not say so
        'matplotlib>=3.9',          # cyclic and perceptual colour maps of the pictures
        'flatbuffers>=24',          # in which jax.export packs a program, and does not say so
        'ml_dtypes>=0.5',           # bfloat16 and float8 in files of weights
        'pillow>=11',               # JPEG and PNG
        'safetensors>=0.5',         # the usual format of weights, written
        'scikit-learn>=1.5',        # scores of the evaluations
        'tensorboardX>=2.6.2',      # event files without TensorFlow
        'tqdm>=4.66',               # progress of conversions
    ],
    extras_require={
        'cuda12': ['jax[cuda12]'],
        'cuda13': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        'wandb': ['wandb>=0.19'],
        'umap': ['umap-learn>=0.5.7'],      # maps of embeddings beside those of PCA
        'test': ['pytest>=8', 'pytest-xdist>=3.6', 'ruff>=0.12', 'xarray>=2024.9', 'h5netcdf>=1.3',
                 *(package for packages in FORMATS.values() for package in packages)],
        **FORMATS,
        'remote': ['fsspec>=2024.6', 'gcsfs>=2024.6', 's3fs>=2024.6'],      # gs:// and s3:// inputs of converters
    },
)
