"""A stand-in for a CARLA 0.9.16 server that the real `carla` client connects to, for tests without the simulator.

It speaks enough of CARLA's wire protocol (MessagePack RPC on a port, sensor streams on the next one) for one scenario
of this project: the road as OpenDRIVE, cars that obey their controls, walkers, a camera, collisions, synchronous ticks,
loading a map, batches. Lane invasions, waypoints and the traffic manager come from the client itself, as with the real
server. It says nothing about the real server's physics, pictures or speed.

Run it with ``python -m tests.envs.carla.loopback --port 0 --scenario highway``: it prints ``ready PORT``.
"""
