"""The positions that merged tokens carry: their anchor's ("original"), or those of several members (PPE)."""

from vtc.positions.ppe import PPE, Positions, combine, members, ppe_positions, sections, slot_of_pair, slots_for

__all__ = ["PPE", "Positions", "combine", "members", "ppe_positions", "sections", "slot_of_pair", "slots_for"]
