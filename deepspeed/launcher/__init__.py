"""Starting ranks on this machine: the `deepspeed` and `ds` commands.

    deepspeed (runner.py)         reads options, chooses devices and cores, reports the first failure
     └─ torch.distributed.run     starts the ranks, gives them their place, notices that one has ended
         └─ rank.py, per rank     guard.py: ends with the launcher, and takes all descendants with it
             └─ script.py         the user's script, module or command

Read in this order: options.py, hosts.py, slots.py, cores.py, job.py, rank.py, guard.py, script.py, failure.py.
"""
