"""What runs inside the guest of the kernel-vfio tests: daemon, clients and checks on emulated devices under vfio-pci.

`python3 -m kvfio` reads scenario names from standard input, one a line, and answers with what the scenario printed and
`@@EXIT STATUS`, like the guest's own command loop. Each scenario runs in a process of its own that was forked from one
which has imported everything: importing takes an emulated CPU seconds.
"""
