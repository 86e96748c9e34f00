//! Labs: namespaces, links, traffic and dumps.
