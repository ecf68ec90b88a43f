"""Grammars of tool calls: from how a format writes them (parsers/structure.py) to what is followed.

The text before a call is free or there is none; a call's arguments follow the tool's JSON schema,
as one object or, in formats that write each argument by itself, argument by argument in the order
of the schema.
"""

import json
from collections.abc import Sequence

from modeling.text.grammar import Spell, sequence
from modeling.text.parsers.structure import ArgumentForm, CallForm, Structure

_HEAD = ("%llguidance {}", "FREE: /(.|\\n)*/")


def of_forced_calls(structure: Structure, spell: Spell, *, is_one: bool) -> str:
    """Calls and nothing else, from the first token on; one alone, or as many as are wanted."""
    syntax = structure.syntax
    lines = [*_HEAD, *_call_rules(structure, spell)]
    between = sequence(spell(syntax.between))
    more = "" if is_one else f" ({between} call)*"
    before, after = sequence(spell(syntax.before)), sequence(spell(syntax.after))
    lines.append(f"start: {before} call{more} {after}")
    return "\n".join(lines)


def of_free_calls(structure: Structure, spell: Spell, *, is_one: bool) -> str | None:
    """Text in which every call that is begun is one of the tools' (tools that are ``strict``).

    None where the format's triggers begin other things as well, so that they tell nothing.
    """
    syntax = structure.syntax
    begins = {syntax.before + form.begin for form in structure.calls}
    trigger = next((t for t in syntax.triggers if all(b.startswith(t) for b in begins)), "")
    parts = spell(trigger)
    if not parts or (len(parts) > 1 and isinstance(parts[0], int)):
        return None
    lines = [*_HEAD, *_call_rules(structure, spell)]
    if isinstance(parts[0], int):
        lines.append(f"trigger: FREE {sequence(parts)}")
    else:
        lines.append(f"trigger[lazy]: /(.|\\n)*/ {json.dumps(trigger)}")
    firsts = []
    for number, form in enumerate(structure.calls):
        rest = (syntax.before + form.begin).removeprefix(trigger)
        firsts.append(f"first_{number}")
        lines.append(f"first_{number}: {sequence(spell(rest))} rest_{number}")
    between, after = sequence(spell(syntax.between)), sequence(spell(syntax.after))
    more = f" ({between} call)*" if syntax.after and not is_one else ""
    lines.append(f"section: trigger ({' | '.join(firsts)}){more} {after}")
    lines.append(f"start: section{'?' if is_one else '*'} FREE")
    return "\n".join(lines)


def _call_rules(structure: Structure, spell: Spell) -> list[str]:
    calls = range(len(structure.calls))
    lines = ["call: " + " | ".join(f"call_{number}" for number in calls)]
    for number, form in enumerate(structure.calls):
        lines.append(f"call_{number}: {sequence(spell(form.begin))} rest_{number}")
        lines.append(f"rest_{number}: arguments_{number} {sequence(spell(form.end))}")
        lines += _argument_rules(number, form, structure.syntax.between_arguments, spell)
    return lines


def _argument_rules(number: int, form: CallForm, between: str, spell: Spell) -> list[str]:
    name = f"arguments_{number}"
    if form.arguments is None:
        return [f"{name}: %json {json.dumps(dict(form.schema))}"]
    # What may follow argument i: first_i while nothing has been written, next_i afterwards.
    lines, end = list[str](), len(form.arguments)
    for i, argument in enumerate(form.arguments):
        one = f"argument_{number}_{i}"
        lines += _value_rules(one, argument, spell)
        for state, separator in (("first", ""), ("next", between)):
            ways = [f"{sequence(spell(separator))} {one} next_{number}_{i + 1}"]
            if not argument.is_required:
                ways.append(f"{state}_{number}_{i + 1}")
            lines.append(f"{state}_{number}_{i}: {' | '.join(ways)}")
    lines += [f'{state}_{number}_{end}: ""' for state in ("first", "next")]
    return [*lines, f"{name}: first_{number}_0"]


def _value_rules(name: str, argument: ArgumentForm, spell: Spell) -> Sequence[str]:
    begin, end = sequence(spell(argument.begin)), sequence(spell(argument.end))
    if not argument.is_text:
        return [f"{name}: {begin} %json {json.dumps(dict(argument.schema))} {end}"]
    choices = argument.schema.get("enum")
    if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
        texts = " | ".join(json.dumps(choice) for choice in choices)
        return [f"{name}: {begin} ({texts}) {end}"]
    return [f"{name}: {begin} {name}_text", f"{name}_text[lazy]: /(.|\\n)*/ {end}"]
