"""Stories of people, places and objects; answers name the two or three facts they follow from.

    Mary went to the kitchen. / Mary took the milk. / Mary went to the garden.
    two:   Where is the milk?                     with Mary in the garden
    three: Where is the milk and where was it?    with Mary in the garden, before in the kitchen

After the tasks 2 and 3 of bAbI (Weston et al., 2015), with gifts; endless, and a hash
of the facts tells their split.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("kitchen", "garden", "hallway", "office", "bathroom", "bedroom")
OBJECTS = ("milk", "apple", "football", "book")


def stories(kind: str, seed: int = 0) -> Iterator[dict[str, str]]:
    """Stories with their questions, without end; `kind` is "two" or "three"."""
    generator = random.Random(f"{kind} {seed}")
    while True:
        world = _World(generator)
        length = generator.randint(3, 6)
        while len(world.facts) < length:
            world.go_on()
        facts = "\n".join(world.facts)
        asked = world.two() if kind == "two" else world.three()
        if asked is not None:
            yield {"prompt": f"{facts}\n{asked[0]}", "completion": asked[1]}


@dataclass
class _World:
    """Who is where, who has what, and where every object has been."""

    generator: random.Random
    facts: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    been: dict[str, list[str]] = field(default_factory=dict)
    """Places of each object that was touched, first to last, each other than the one before."""

    def go_on(self) -> None:
        """One fact more."""
        draw = self.generator
        person = draw.choice(PEOPLE)
        own = [o for o, p in self.holder.items() if p == person]
        what = draw.random()
        if person not in self.place or what < 0.5:
            self._move(person, draw.choice([p for p in PLACES if p != self.place.get(person)]))
        elif own and what < 0.62:
            thing = draw.choice(own)
            del self.holder[thing]
            self.facts.append(f"{person} left the {thing} there.")
        elif own and what < 0.8:
            others = [p for p in self.place if p != person and self.place[p] == self.place[person]]
            if others:
                self.holder[thing := draw.choice(own)] = (other := draw.choice(others))
                self.facts.append(f"{person} gave the {thing} to {other}.")
        else:
            here = self.place[person]
            free = [o for o in OBJECTS if o not in self.holder and self._is_at(o, here)]
            if free:
                self.holder[thing := draw.choice(free)] = person
                self._at(thing, here)
                self.facts.append(f"{person} took the {thing}.")

    def _move(self, person: str, place: str) -> None:
        self.place[person] = place
        for thing, holder in self.holder.items():
            if holder == person:
                self._at(thing, place)
        self.facts.append(f"{person} went to the {place}.")

    def _is_at(self, thing: str, place: str) -> bool:
        return self.been.get(thing, [place])[-1] == place

    def _at(self, thing: str, place: str) -> None:
        been = self.been.setdefault(thing, [])
        if been[-1:] != [place]:
            been.append(place)

    def two(self) -> tuple[str, str] | None:
        """Where is an object that somebody has?"""
        if not self.holder:
            return None
        thing = self.generator.choice(sorted(self.holder))
        return f"Where is the {thing}?", f"with {self.holder[thing]} in the {self.been[thing][-1]}"

    def three(self) -> tuple[str, str] | None:
        """And where was it before?"""
        things = [t for t in sorted(self.holder) if len(self.been[t]) > 1]
        if not things:
            return None
        thing = self.generator.choice(things)
        before, now = self.been[thing][-2:]
        answer = f"with {self.holder[thing]} in the {now}, before in the {before}"
        return f"Where is the {thing} and where was it?", answer
