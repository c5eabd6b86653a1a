"""Objectives: what a student is trained to minimise. Their tables are free of heavy imports.

A row names a class as "module:class", in the way in which recipes name a user's own functions.
"""

#: Value of `objective.kind` -> the class of that objective.
OBJECTIVES = {
    "sampled": "poweropd.objectives.sampled:Sampled",
    "full_vocab": "poweropd.objectives.full_vocab:FullVocab",
}
#: Value of `objective.select.name` -> the class of that token selection.
SELECTIONS = {
    "dial": "poweropd.objectives.selection:Dial",
    "random": "poweropd.objectives.selection:Random",
    "teachable": "poweropd.objectives.selection:Teachable",
}
#: Value of `objective.weights.name` -> the class of those token weights.
WEIGHTS = {"drift": "poweropd.objectives.weights:Drift"}
