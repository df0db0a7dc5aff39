"""Your own requests, replayed: readers of request logs, simulated caches, advice in plain words.

A log is read once, in a stream, into compact columns (:mod:`kvbench.traffic.log`). Exact, prefix
and semantic caches are replayed on those columns (:mod:`~kvbench.traffic.exact`,
:mod:`~kvbench.traffic.prefix`, :mod:`~kvbench.traffic.semantic`, :mod:`~kvbench.traffic.together`,
:mod:`~kvbench.traffic.fleet`); :mod:`~kvbench.traffic.replay` does all of it for one log, model and
memory, and :mod:`~kvbench.traffic.advise` says what follows. Nothing of a log leaves the machine,
and nothing here needs torch but the sentence encoder of the semantic part.
"""
