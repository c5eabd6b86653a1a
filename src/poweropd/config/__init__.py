"""The recipe: one typed tree, read from YAML."""

from poweropd.config.recipe import Config

__all__ = ["Config"]
