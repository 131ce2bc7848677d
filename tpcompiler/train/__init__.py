"""The bundled trainer: mixed precision over tensor × data parallel ranks.

Its rooms. Each one imports only from those above it:

    data      from text to the batches of every step
    optim     learning rate, gradient norm, loss scale and the optimizer's step
    hold      how a rank holds its parameters, and where their values come from
    step      the compiled model, and a step of it: forward, backward, update
    show      the screen, the log and the curves
    run       the processes of a run, its loop, and its checkpoints
    evaluate  perplexity and cloze accuracy

`settings.py` (the spec's `train:` section) and `private_torch.py` import from none of them.
"""
