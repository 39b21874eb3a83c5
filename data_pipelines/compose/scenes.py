"""The backgrounds of the composed detection set: photographs without people and without anything of its classes.

Twenty of the candidates in three Debian packages, all looked at. The unit of the split is the photograph, not a crop.
"""

from dataclasses import dataclass

from data_pipelines.packages import Package

PACKAGES = {
    "mate": Package(
        "deb",
        "mate-backgrounds",
        "1.26.0-1",
        "mate-backgrounds_1.26.0.deb",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "GPL-2+",
        "the MATE team and the photographers named in the package",
    ),
    "plasma": Package(
        "deb",
        "plasma-workspace-wallpapers",
        "4:5.27.5-2",
        "plasma-workspace-wallpapers_5.27.5.deb",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "GPL-2+",
        "the KDE Visual Design Group and the photographers named in the package",
    ),
    "kphotoalbum": Package(
        "deb",
        "kphotoalbum",
        "5.9.1-1",
        "kphotoalbum_5.9.1.deb",
        "00f8b26b5db1beb30a822d15f464b3c68ffa556d267870aa98a59aaaaf81ec43",
        "GPL-2+",
        "the KPhotoAlbum developers",
        platform=("-o", "APT::Architecture=amd64"),
    ),
}
MATE = "usr/share/backgrounds/mate/nature/"
PLASMA = "usr/share/wallpapers/"
KPHOTO = "usr/share/kphotoalbum/demo/"
WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Scene:
    """One photograph."""

    name: str
    package: str
    path: str
    split: str
    phrase: str
    """What follows the objects in a caption."""
    part: tuple[float, float, float, float] = WHOLE
    """x0, y0, x1, y1 as fractions: what may be used of it; a kite and a leaf in focus are cut away so."""


def _mate(name: str, split: str, phrase: str) -> Scene:
    return Scene(name, "mate", f"{MATE}{name}.jpg", split, phrase)


def _plasma(name: str, split: str, phrase: str, part: tuple[float, float, float, float] = WHOLE) -> Scene:
    return Scene(name, "plasma", f"{PLASMA}{name}/contents/images/2560x1600.jpg", split, phrase, part)


def _kphoto(name: str, split: str, phrase: str) -> Scene:
    return Scene(name, "kphotoalbum", f"{KPHOTO}{name}.jpg", split, phrase)


SCENES = (
    _mate("Blinds", "train", "on a green leaf"),
    _mate("Dune", "train", "in dune grass by the sea"),
    _mate("RainDrops", "train", "among wet leaves"),
    _mate("Storm", "train", "under a stormy sky"),
    _plasma("BytheWater", "train", "on a wooden jetty"),
    _plasma("DarkestHour", "train", "in blue mist"),
    _plasma("FallenLeaf", "train", "among autumn leaves", (0.0, 0.0, 0.62, 1.0)),
    _plasma("Grey", "train", "before a grey facade"),
    _plasma("Kite", "train", "in the blue sky", (0.0, 0.0, 0.62, 1.0)),
    _plasma("Path", "train", "in a dark forest"),
    _kphoto("grand_canyon_3", "train", "above a canyon"),
    _kphoto("skagen", "train", "over the waves"),
    _mate("GreenMeadow", "val", "in the grass"),
    _plasma("ColdRipple", "val", "on a pier in the fog"),
    _kphoto("skagen_2", "val", "above the coast"),
    _mate("Aqua", "test", "by a splash of water"),
    _mate("Wood", "test", "on pale wood"),
    _plasma("OneStandsOut", "test", "among small green plants"),
    _plasma("summer_1am", "test", "by a violet lake"),
    _kphoto("sunset", "test", "at sunset"),
)
