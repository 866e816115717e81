"""`demerge methods`: the merge methods with their options and papers."""

from __future__ import annotations

from demerge.cli.common import Json, emit, show


def methods(json: Json = False) -> None:
    """List the merge methods, their options and their papers.

    A task vector is an expert minus the base. A task matrix is the part of it that changes one
    weight matrix.
    """
    from demerge.merging import all_methods
    from demerge.merging.recipe.foreign_names import DIFFERENCES, STAGES

    documents = [method.document() for method in all_methods().values()]
    emit({"methods": documents}, None, json)
    if json:
        return
    for method in documents:
        aliases = f" (also {', '.join(method['aliases'])})" if method["aliases"] else ""
        show(f"{method['name']}{aliases}, {method['paper'] or 'no paper'}\n    {method['summary']}")
        for name, option in method["options"].items():
            show(f"    --option {name}={option['default']}    {option['rule']}")
        for name, options in method["presets"].items():
            values = ", ".join(f"{n}={value}" for n, value in options.items()) or "the defaults"
            show(f"    --option preset={name}    {values}")
        if method["needs"]:
            show(f"    needs {', '.join(method['needs'])}")
    for name, (multiplier, signs, models) in DIFFERENCES.items():
        weights = " and ".join("m" if sign > 0 else "-m" for sign in signs)
        show(f"{name}: task_arithmetic of the models {models}, weights {weights}")
        show(f"    --option multiplier={multiplier}")
    for name, (base, options) in STAGES.items():
        show(f"{name}: {base} then={options['then']}")
