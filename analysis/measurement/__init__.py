"""The measurement: gradients by bin of timesteps and group of samples, shortened as they come, until a map is whole.

`stage` checks and starts it; `gradients` says what is measured and at what cost, `draws` on which samples, `cells` runs the
backward passes one after the other, `backward` gives a gradient out in pieces, `sketch` shortens them, `partial` keeps what is
done of it.
"""
