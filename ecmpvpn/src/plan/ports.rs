//! Picks the tunnels' port pairs so that they spread over the bond members in both directions.
