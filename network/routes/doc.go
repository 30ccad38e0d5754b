// Package routes makes a network of a cluster's nodes: routes to the other nodes' pod CIDRs, from the cluster's Node objects.
//
// A node in the same subnet is the next hop itself ([HostGateway]); one behind a router is reached through VXLAN ([VXLAN]);
// [Auto] takes for each node and family what fits. It promises:
//   - what should be is computed without I/O ([Compute]); what differs in the kernel is changed over netlink, and nothing else:
//     routes are known as ours by their protocol ([Protocol]), links and the nftables table by their names. Whatever others
//     have made stays, also where it is in the way, which is said;
//   - what pods send to pods of other nodes keeps its source address, whatever masquerades behind;
//   - a Node object that cannot be right (ranges that overlap others', that hold addresses of nodes, a default route) is left
//     out by name, range and reason, and takes nothing from older nodes;
//   - while nobody can say what should be (no API server, no object of this node, no pod CIDR), all stays as it is; the end of
//     the daemon changes nothing, and its next start changes what differs;
//   - a node whose network comes from elsewhere than berth's default network has nothing of it.
//
// Its rights at the API server are to list and to watch Nodes: the Ethernet addresses of the tunnel's ends are computed from
// the nodes' addresses ([macOf]), so that nobody needs to publish them.
//
// It does not encrypt or authenticate: who can send from a node's address on the network between the nodes can send to pods.
// It does not change what the firewall of the node forwards, which it looks at and warns of. (Where iptables drops it, the default
// network lets its own range through.)
package routes
