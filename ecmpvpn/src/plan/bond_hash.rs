//! The bonding driver's transmit hash, bit exact: which member carries an outer packet. Source: drivers/net/bonding/bond_main.c.
