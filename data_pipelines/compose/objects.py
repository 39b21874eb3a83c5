"""The cut-outs of the composed detection set: which stamps of Tux Paint belong to which class, and to which split.

All photographs were looked at; drawings among them and what fits no class (a wheel, a puzzle of police emblems, a glass
that one sees through) are left out. A class is a folder of the package or a part of one, so that it has several files:
nearly every name has a single file, and a class that is trained on some files can be tested on others only so.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NOVEL = ("bird", "fruit")
"""Classes without boxes in the training split. Whole folders, and the two with the most files after the flowers, so
that the test part still shows many different unseen cut-outs of them. Both have relatives among the base classes
(mammals and fish; vegetables, flowers and balls), as the novel classes of LVIS have: what is an object can be learned
from these, what it is called only from captions."""

HELD_OUT = {"test": 0.25, "val": 0.12}
"""Share of the names of every class that is kept for these splits; at least one name each."""

TABLE = {
    "bird": """
        animals/birds/ adelaide-rosella=Adelaide rosella, albino_peahen, blackbird, chicken_profile=chicken, crow,
            crowned_crane, cuckoo, drake, duck, gander, guineafowl=guinea fowl, helmeted_guineafowl=helmeted
            guinea fowl, hen=brown hen, heron_greatblue=great blue heron, heron_greatblue_flying=great blue heron,
            lark, little-penguin, magellanic_penguin=Magellanic penguin, magpie, nandou=rhea, ostrich, owl,
            peacock, pelican, penguin, pigeon, pink_flamingo, quetzal, rainbow-lorikeet, rooster, seagull,
            silver-gull, tucan=toucan, turkey, vulture
        """,
    "fruit": """
        food/fruit/ Apricot_whole=apricot, Cherry_Stella=pair of cherries, Strawberry2=strawberry, apple_fuji=Fuji
            apple, apple_granny_smith=Granny Smith apple, apple_green=green apple, apple_red=red apple,
            apple_sierra_beauty=Sierra Beauty apple, apricot, avocado, banana, cherimoya, grapes=bunch of grapes,
            kiwi=kiwifruit, lemon, mandarine=mandarin orange, mango, orange, orange_seville=Seville orange, pear,
            pineapple, pomegranate, raspberry, sliced_lime, sliced_orange, strawberry
        """,
    "fish": """
        animals/fish/ bluegroper=blue groper, butterflyfish, clownfish, coraltrout=coral trout, dolphinfish,
            lionfish, moonwrasse=moon wrasse, seahorse, stripedfish=stripey fish
        """,
    "insect": """
        animals/insects/ fly, grasshopper, hornet, hoverfly, mantis, xanthia=xanthia moth
        """,
    "bovine": """
        animals/mammals/bovines/ bison, bull, cow, cow_white=cow, gnu-baby-stand=gnu, gnu-baby=gnu,
            gnu-sitting=gnu, gnu-stand=gnu, yak, zebu
        """,
    "sheep or goat": """
        animals/mammals/bovines/ goat, mountaingoat=mountain goat, ram, sheep, sheep_lamb=lamb
        """,
    "deer": """
        animals/mammals/deer/ caribou, deer, doe, wapiti
        animals/mammals/bovines/ indian_blackbuck=Indian blackbuck
        """,
    "horse or camel": """
        animals/mammals/equines/ donkey, donkey_eating=donkey, horse, zebra
        animals/mammals/camel/ camel, dromedary
        """,
    "carnivore": """
        animals/mammals/cats/ lion-2=lion, lion, tiger, tiger_sumatran=Sumatran tiger
        animals/mammals/dogs/ dingo, dog, fox
        animals/mammals/bears/ bear, european-bear=European bear
        animals/mammals/ badger, ferret
        """,
    "rodent or rabbit": """
        animals/mammals/rodents/ beaver, capybara, marmot, mouse, rabbit-2=big-eared rabbit, rabbit, rat, squirrel
        animals/mammals/ rabbit_little=little rabbit
        """,
    "sea mammal": """
        animals/mammals/aquatic/ dolphin, orca, otter, sea_lion, whale
        """,
    "vegetable": """
        food/vegetables/ broccoli=head of broccoli, carrot, chilepepper=chile pepper, corn=cob of corn, eggplant,
            garlic=garlic bulb, garlics=string of garlic, lettuce=head of lettuce, onion, pattypan_squash,
            pepper=green pepper, potato, pumpkin_small=small pumpkin, redlettuce=head of red lettuce, tomato, yam,
            yellowpepper=yellow pepper
        food/spices/ ginger=ginger root
        """,
    "flower": """
        plants/flowers/ adeenia=desert rose, anemone_red=red anemone, anthoorium=anthurium, appooppanthady=Indian
            milkweed, bolsom=balsam, chemparathi=hibiscus, daffodil, flower1=violet flower, flower10=hibiscus,
            flower2=lime yellow flower, flower3=yellow star flower, flower4=pair of blue flowers, flower5=greenish
            yellow flower, flower6=lilac star flower, flower7=bunch of orange flowers, flower8=pink flower,
            flower9=dewy pink flower, iris, marigold, pigface=purple pigface, red-gazania, rose,
            whitestar-petunia=white star petunia, yellow-flower
        plants/flowers/plastic/ chuvanna_plastic_poo=red plastic flower
        """,
    "tree": """
        plants/trees/ birch, holm_oak, liberia-palm=palm tree, tree336=pili nut tree
        seasonal/christmas/ Christmas_Tree_photo=Christmas tree
        """,
    "mushroom": """
        plants/mushrooms/ cep-1=cep, cep-2=pair of ceps, cep=red-headed cep
        food/vegetables/ mushroom=button mushroom
        """,
    "tool": """
        household/tools/ hammer, mallet_metal=metal mallet, measuring_tape, paintbrush_large=large paintbrush,
            plyers=pair of pliers, saw, spade=garden spade, toolbox, wrench, wrench_adjustable=adjustable wrench,
            wrench_plumbers=plumber's wrench
        household/arttools/ scissors_small_closed=pair of closed scissors, scissors_small_open=pair of open
            scissors
        """,
    "musical instrument": """
        hobbies/music/brass/ trumpet
        hobbies/music/percussion/ cymbal_crash=crash cymbal, drum_tomtom_floor=floor tom drum, drumkit=drum kit
        hobbies/music/string/ cello, guitar2=electric guitar, guitar_classical=classical guitar,
            guitar_electric=electric guitar, guitar_electric_bass=electric bass guitar, violin
        hobbies/music/wind/ bassoon
        """,
    "vehicle": """
        vehicles/auto/ beetle=VW Beetle, sedan=sedan car, sportscar2=sports car, truck=pickup truck
        vehicles/construction/ dumper
        vehicles/cycle/ pink_tricycle
        vehicles/emergency/ firetruck=fire truck
        vehicles/ garbagetruck=garbage truck
        vehicles/masstransit/ green_korean_bus=green bus
        vehicles/race/ indycar=race car
        """,
    "kitchenware": """
        household/dishes/ mug, pitcher_small=small pitcher, teapot
        household/dishes/utensils/ nutcracker, pepper_grinder
        household/ kettle=electric kettle
        """,
    "ball": """
        sports/ australian_rules_football=Australian rules football, basketball, cricketball=cricket ball,
            football=American football, soccer=soccer ball, tennis_ball
        """,
}  # fmt: skip
"""Class -> folders below `stamps/`, each followed by its files; `file=name` where the file's name will not do."""

DISTRACTORS = """
    space/planets/ 1_mercury, 2_venus, 3_earth, 4_mars, 5_jupiter, 7_uranus, 8_neptune, 9_pluto
    space/moon/ moon_full, moon_3qt
    space/ apollo_lander, voyager2
    town/roadsigns/ dead_end_sign, give_way_sign, no_entry_sign, roundabout, school_sign, stop, traffic_cone,
        yield
    town/ uk_post_box, usps_mailbox
    seasonal/halloween/ grave-a, grave-b, grave-c, grave-d, grave-e, grave-f, grave-g, grave-i, grave-j
    seasonal/christmas/ Candy_cane_photo_1, Candy_cane_photo_2, Mince_Pie, xmaswreath
    sports/ tennis_racket, trophy_cup
    medical/ bandage_adhesive, stethoscope, syringe
    """
"""Objects of other groups: pasted like the others, never named or boxed, so that pasting alone makes no object."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One cut-out: a file of the package."""

    path: str
    """Below `stamps/`, without `.png`."""
    kind: str
    """Its class; empty for a distractor."""
    name: str
    """What it shows, without an article."""


def things() -> list[Thing]:
    """All cut-outs that are named and boxed."""
    return [thing for kind, table in TABLE.items() for thing in _listed(kind, table)]


def distractors() -> list[Thing]:
    """All that are neither."""
    return _listed("", DISTRACTORS)


def _listed(kind: str, table: str) -> list[Thing]:
    """What a text of the table says: a word that ends in / is a folder, what follows are its files, with commas."""
    found = []
    for folder, files in re.findall(r"(\S+/)\s([^/]+)(?=\s\S+/|\s*$)", table):
        for entry in files.split(","):
            file, _, name = " ".join(entry.split()).partition("=")
            found.append(Thing(folder + file, kind, name or file.replace("_", " ").replace("-", " ")))
    return found


def split_things(items: Iterable[Thing]) -> Mapping[str, list[Thing]]:
    """train, val, test -> its cut-outs, by a fixed hash of the name within each class, so equal names stay together.

    Names with several files come last, which is to say into the training part. Every class with three names or more is
    in all three.
    """
    groups: dict[str, dict[str, list[Thing]]] = {}
    for thing in items:
        groups.setdefault(thing.kind, {}).setdefault(thing.name.lower(), []).append(thing)
    found: dict[str, list[Thing]] = {"train": [], "val": [], "test": []}
    for kind, named in groups.items():
        order = sorted(named, key=lambda name: (len(named[name]) > 1, _hash(f"{kind}:{name}")))
        start = 0
        for split, share in HELD_OUT.items():
            count = max(1, round(share * len(order)))
            found[split] += (thing for name in order[start : start + count] for thing in named[name])
            start += count
        found["train"] += (thing for name in order[start:] for thing in named[name])
    return found


def _hash(text: str) -> bytes:
    return hashlib.sha256(f"vlp-detection-1:{text}".encode()).digest()
