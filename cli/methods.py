"""`demerge methods`: the merge methods with their options and papers."""

from __future__ import annotations

from demerge.cli.common import Json, emit, show


def methods(json: Json = False) -> None:
    """List the merge methods, their options and their papers."""
    from demerge.merging import all_methods
    from demerge.merging.recipe.method_names import DIFFERENCES, STAGES

    documents = [method.document() for method in all_methods().values()]
    emit({"methods": documents}, None, json)
    if json:
        return
    for d in documents:
        aliases = f" (also {', '.join(d['aliases'])})" if d["aliases"] else ""
        show(f"{d['name']}{aliases}, {d['paper'] or 'no paper'}\n    {d['summary']}")
        for name, option in d["options"].items():
            show(f"    --option {name}={option['default']}    {option['rule']}")
        for name, options in d["presets"].items():
            show(
                f"    --option preset={name}    {', '.join(f'{n}={v}' for n, v in options.items()) or 'the defaults'}"
            )
        if d["needs"]:
            show(f"    needs {', '.join(d['needs'])}")
    for name, (m, signs, models) in DIFFERENCES.items():
        weights = " and ".join("m" if sign > 0 else "-m" for sign in signs)
        show(
            f"{name}: task_arithmetic of the models {models}, weights {weights}\n    --option multiplier={m}"
        )
    show(
        "\n".join(
            f"{name}: {method} then={options['then']}" for name, (method, options) in STAGES.items()
        )
    )
