"""The scorer: a vision-language model that reads an image and a prompt into a distribution over score levels.

`rubric` what is asked and where the answer is read; `patches` pixels to model input; `model` the forward pass;
`comparison` which of two pictures it finds better; `evaluate` how good it is. `tasks/` trains it,
`rewards/zreward.py` uses it.
"""
