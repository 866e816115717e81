"""What experts do to their base: their task vectors, the losses around it, and weights that follow from its outputs.

`taskvectors` compares them entry by entry, `landscape` evaluates losses along them, `responses` their effect on outputs, of
which `coefficients` makes weights in closed form; `balance` is the command `demerge coefficients`. `transfer` predicts from a
stored map what each does to the loss of each range, by the sketches of `sketched`; `prediction` is the command `demerge
transfer`; `survey` is the command `demerge landscape`. `records` is what lies beside experts, `plots` draws.
"""
