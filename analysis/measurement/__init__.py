"""The measurement: gradients by bin of timesteps and group of samples, shortened as they come, until a map is whole.

`stage` checks and starts it; `settings` is what is asked; `gradients` says what is measured and at what cost, `run` carries it
through, `budget` says how many groups are enough, `draws` on which samples, `cells` runs the backward passes one after the
other, `backward` gives a gradient out in pieces, `sketch` shortens them, `fisher` takes their squares along, `partial` keeps
what is done of it, `parallel` shares it among processes, `lock` keeps others out, `schedule` tells one noise schedule from
another.
"""
