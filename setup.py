"""What pyproject.toml cannot say: the YAML files of configs/ are in the package, as lightning_rectify/configs/."""

from setuptools import find_namespace_packages, find_packages, setup

NAME = "lightning_rectify.configs"

setup(
    packages=[
        *find_packages(include=["lightning_rectify*"]),
        NAME,
        *(f"{NAME}.{folder}" for folder in find_namespace_packages("configs")),
    ],
    package_dir={NAME: "configs"},
)
