"""`demerge layers`: which layers to train for experts on ranges, from a stored conflict map."""

from __future__ import annotations

from demerge.analysis.layers.options import LayersOptions
from demerge.cli.common import Json, emit, say, show
from demerge.cli.options import from_options


@from_options
def layers(options: LayersOptions, *, json: Json = False) -> None:
    """Rank layers by what experts gain on them per parameter, judged on held-out samples.

    If the ranking is not better than chance, all layers are chosen. It needs neither the model nor
    its data.

    demerge analyze base --data D --layers --metric adam -o map
    demerge layers map --share 0.1 -o layers.json
    demerge finetune base --data D --train-layers layers.json -o experts
    """
    from demerge.analysis.planning.layers import plan

    planned = plan(options)
    result = planned.run()
    say(*planned.describe(), *result.lines())
    path = options.out or options.plot
    emit(result.document(), path, json)
    if path is None and not json:
        show(*result.choice.train)
