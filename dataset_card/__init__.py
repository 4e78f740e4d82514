"""The dataset repository's card. An `__init__` so that the template is installed with the package (setup.cfg, `package_dir`)."""
