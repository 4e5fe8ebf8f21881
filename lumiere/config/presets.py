"""The configs that come with Lumiere. Importing this loads neither pydantic nor yaml: a shell asks here for names."""

from pathlib import Path

SUFFIXES = (".yaml", ".yml", ".toml")


def shipped_configs() -> dict[str, Path]:
    """The configs that come with Lumiere, by bare name."""
    packaged = Path(__file__).parents[1] / "configs"
    # An installed wheel carries them inside the package; a checkout keeps them beside it.
    folder = packaged if packaged.is_dir() else packaged.parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
