"""What experts do to their base.

task_vectors     compares them entry by entry
loss_landscape   measures losses along them
responses        measures their effect on outputs
closed_form      computes merge weights from these responses
first_order      predicts from a stored map what each does to the loss of each range
sketched         their task vectors as the map's sketches see them
inputs           opens base and experts
"""
