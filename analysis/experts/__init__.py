"""What experts do to their base.

`task_vectors` compares them entry by entry. `landscape` measures losses along them. `responses`
measures their effect on outputs, from which `coefficients` computes weights in closed form.
`transfer` predicts from a stored map what each does to the loss of each range, by the sketches of
`sketched`. `inputs` opens base and experts. `options` are those of the commands, whose stages are
in `demerge.analysis.stages`. `plots` draws.
"""
