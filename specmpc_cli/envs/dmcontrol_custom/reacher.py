"""The reacher with three links."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
from dm_control.rl.control import Environment
from dm_control.suite import reacher

from specmpc_cli.envs.dmcontrol_custom.models import edited

_LINK = 0.09  # metres


def _add_a_link(root: ET.Element) -> None:
    """arm (0.09) → hand becomes arm (0.09) → forearm (0.09) → hand (0.1, finger at 0.09), with a motor for each of the three hinges."""
    arm, hand = root.find(".//body[@name='arm']"), root.find(".//body[@name='hand']")
    motors = root.find("actuator")
    assert arm is not None and hand is not None and motors is not None
    arm.remove(hand)
    _geom(arm, "arm").set("fromto", f"0 0 0 {_LINK} 0 0")

    forearm = ET.SubElement(arm, "body", name="forearm", pos=f"{_LINK} 0 0")
    ET.SubElement(forearm, "geom", name="forearm", type="capsule", fromto=f"0 0 0 {_LINK} 0 0", size=".01", material="self")
    ET.SubElement(forearm, "joint", name="elbow", limited="true", range="-80 80")
    forearm.append(hand)

    hand.set("pos", f"{_LINK} 0 0")
    finger, wrist = hand.find("body[@name='finger']"), hand.find("joint[@name='wrist']")
    assert finger is not None and wrist is not None
    finger.set("pos", f"{_LINK} 0 0")
    wrist.set("range", "-80 80")

    elbow = ET.Element("motor", name="elbow", joint="elbow")
    motors.insert(1, elbow)


def _geom(body: ET.Element, name: str) -> ET.Element:
    geom = body.find(f"geom[@name='{name}']")
    assert geom is not None
    return geom


def make(random: np.random.RandomState, target_size: float) -> Environment:
    physics = reacher.Physics.from_xml_string(*edited(reacher.get_model_and_assets(), _add_a_link))
    return Environment(physics, reacher.Reacher(target_size=target_size, random=random), time_limit=20)
