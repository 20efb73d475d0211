"""Orders in short messages, made from templates."""

from __future__ import annotations

import json
import random
from functools import cache

from secura_serve.evaluate.tasks.registry import register_task
from secura_serve.evaluate.tasks.rows import Row, Splits, seeded, three, words
from secura_serve.evaluate.tasks.task import Task

__all__ = ["extract"]

_TRAIN, _TEST = 700, 250
_TRAIN_WORDS = {
    "name": words("""
        Anna Bruno Carla David Elena Felix Grace Hugo Irene Jonas Karin Louis Maria Nina
        Oscar Paula Quentin Rosa Simon Tanya Ulrich Vera William Xenia Yusuf Zoe Amir Bella Chen
        Diego Emma Farid Greta Hassan Ingrid Jakub Kofi Lena Mateo Noor"""),
    "item": words("""
        apples bicycles blankets books bottles bowls boxes candles chairs clocks cups desks
        envelopes forks gloves hammers hats jackets kettles keyboards ladders lamps mirrors mugs
        notebooks pans pencils pillows plates radios scarves shelves shirts shoes spoons"""),
    "city": words("""
        Amsterdam Athens Berlin Bogota Boston Cairo Chicago Dakar Delhi Dublin Geneva
        Hamburg Hanoi Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila Milan
        Moscow Mumbai Nairobi Naples Oslo Paris Prague Quito Rome Seoul Sydney"""),
}
_TEST_WORDS = {
    "name": words("Beatrice Conrad Doris Edwin Fiona Gustav Harriet Isaac Judith Leon Miriam"),
    "item": words("buckets cushions drills hoses ladles needles rugs saws toasters wheels"),
    "city": words("Antwerp Bergen Cardiff Dresden Granada Krakow Leeds Montreal Osaka Utrecht"),
}
_SYLLABLES = words("""
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
    """Make up a word that nobody knows.

    Without these the model recalls a likely word, and a name that is rare (Brussels) comes back as
    one that is common (Belgium). It must learn to copy.
    """
    word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((2, 2, 3))))
    return word + "s" if key == "item" else word.capitalize()


@cache
def extract() -> Splits:
    """Make orders in short messages -> JSON with name, item, quantity and city.

    In the training data every second word is invented; the held-out words are all real, and
    names, goods, places, quantities and sentences of the test rows stand in no other split.
    """
    rng = seeded("extract")

    def row(train: bool) -> Row:
        vocabulary = _TRAIN_WORDS if train else _TEST_WORDS
        fields: dict[str, str | int] = {
            key: _invented(rng, key) if train and rng.random() < 0.5 else rng.choice(values)
            for key, values in vocabulary.items()
        }
        fields["quantity"] = rng.choice(range(2, 60) if train else range(60, 100))
        message = rng.choice(_TRAIN_FORMS if train else _TEST_FORMS).format(**fields)
        wanted = {key: fields[key] for key in ("name", "item", "quantity", "city")}
        prompt = f"Extract name, item, quantity and city as JSON: {message}"
        return prompt, json.dumps(wanted)

    return three([row(True) for _ in range(_TRAIN)], [row(False) for _ in range(_TEST)])


register_task(
    Task(
        name="extract",
        title="order message -> JSON of name, item, quantity, city",
        source="made from templates",
        scoring="json",
        max_new_tokens=96,
        load=extract,
    )
)
