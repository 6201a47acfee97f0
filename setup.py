"""Everything else stands in pyproject.toml; it cannot say that a package lies outside of the others' folder.

The shipped checkpoint lies at checkpoints/nano and is installed inside the package (hsa_ultralong.default_checkpoint).
"""

from setuptools import find_namespace_packages, setup

NANO = "hsa_ultralong.checkpoints.nano"

setup(
    packages=[*find_namespace_packages(include=["hsa_ultralong*"]), NANO],
    package_dir={NANO: "checkpoints/nano"},
)
