"""Make it so: everything on the control path that touches a disk, a process or the network.

code (what runs) -> local | existing (a Ray cluster) -> dashboard (its REST API) -> observe -> apply -> wait
"""
