//go:build integration

package integration

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// waitLong is how long a case waits for what must come; only a broken one waits as long.
const waitLong = time.Minute

// networkFields are about names, ports and the network.
func networkFields() []fieldGroup {
	resolv := func(name, about string, dns *runtimeapi.DNSConfig, want string) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, func(c *podConfig) { c.DnsConfig = dns })
			if dns == nil {
				data, err := os.ReadFile("/etc/resolv.conf")
				must(t, err)
				want = string(data)
			}
			f.says(t, p, f.ctr("cat /etc/resolv.conf"), want)
		}}
	}
	return []fieldGroup{
		{"dns", []fieldCase{
			resolv("servers, searches and options", "PodSandboxConfig.dns_config DNSConfig.servers DNSConfig.searches DNSConfig.options",
				&runtimeapi.DNSConfig{Servers: []string{"10.0.0.1", "fd00::1"}, Searches: []string{"a.b", "c"}, Options: []string{"ndots:5", "edns0"}},
				"search a.b c\nnameserver 10.0.0.1\nnameserver fd00::1\noptions ndots:5 edns0\n"),
			resolv("servers alone", "DNSConfig.servers", &runtimeapi.DNSConfig{Servers: []string{"10.0.0.1"}}, "nameserver 10.0.0.1\n"),
			resolv("more servers than a resolver asks", "DNSConfig.servers", &runtimeapi.DNSConfig{Servers: []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"}},
				"nameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\nnameserver 10.0.0.4\n"),
			resolv("empty is empty", "PodSandboxConfig.dns_config", &runtimeapi.DNSConfig{}, ""),
			resolv("none is the node's", "PodSandboxConfig.dns_config", nil, ""),
			{"given on the node's network, too", "PodSandboxConfig.dns_config", func(t *testing.T, f *fields) {
				p := f.newPod(t, hostNetworkPod, func(c *podConfig) { c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"10.9.8.7"}} })
				f.says(t, p, f.ctr("cat /etc/resolv.conf"), "nameserver 10.9.8.7\n")
			}},
		}},
		{"ports", []fieldCase{
			{"tcp", "PodSandboxConfig.port_mappings PortMapping.protocol PortMapping.container_port PortMapping.host_port", func(t *testing.T, f *fields) {
				port := freePort(t, "tcp")
				p := f.newPod(t, plainPod, func(c *podConfig) {
					c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 8080, HostPort: port}}
				})
				f.start(t, p, f.ctr("exec tcpsvd -E 0 8080 echo through tcp"))
				f.wantTCP(t, fmt.Sprintf("127.0.0.1:%d", port), "through tcp\n")
			}},
			{"udp", "PortMapping.protocol", func(t *testing.T, f *fields) {
				port := freePort(t, "udp")
				p := f.newPod(t, plainPod, func(c *podConfig) {
					c.PortMappings = []*runtimeapi.PortMapping{{Protocol: runtimeapi.Protocol_UDP, ContainerPort: 5353, HostPort: port}}
				})
				f.start(t, p, f.ctr("exec udpsvd -E 0 5353 cat"))
				f.wantUDP(t, fmt.Sprintf("127.0.0.1:%d", port), "through udp")
			}},
			{"on one address", "PortMapping.host_ip", func(t *testing.T, f *fields) {
				port := freePort(t, "tcp")
				gateway := strings.TrimSuffix(f.Subnet(), "0/24") + "1"
				p := f.newPod(t, plainPod, func(c *podConfig) {
					c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 8080, HostPort: port, HostIp: gateway}}
				})
				f.start(t, p, f.ctr("exec tcpsvd -E 0 8080 echo here"))
				f.wantTCP(t, fmt.Sprintf("%s:%d", gateway, port), "here\n")
				if conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 5*time.Second); err == nil {
					_ = conn.Close()
					t.Error("the port is open on another address")
				}
			}},
			{"no host_port, no mapping", "PortMapping.host_port", func(t *testing.T, f *fields) {
				p := f.newPod(t, plainPod, func(c *podConfig) { c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 8080}} })
				f.start(t, p, f.ctr("exec tcpsvd -E 0 8080 echo at the pod"))
				f.wantTCP(t, f.podStatus(t, p.id).Network.Ip+":8080", "at the pod\n")
			}},
		}},
		{"sysctls", []fieldCase{
			{"of network and IPC", "LinuxPodSandboxConfig.sysctls", func(t *testing.T, f *fields) {
				p := f.newPod(t, plainPod, func(c *podConfig) {
					c.Linux.Sysctls = map[string]string{
						"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100", "net.core.somaxconn": "77", "net.ipv4.ip_local_port_range": "40000 40100", "kernel.msgmax": "4096",
					}
				})
				f.says(t, p, f.ctr("cd /proc/sys; cat kernel/shm_rmid_forced fs/mqueue/msg_max net/core/somaxconn net/ipv4/ip_local_port_range kernel/msgmax"), "1\n100\n77\n40000\t40100\n4096\n")
				if host, err := os.ReadFile("/proc/sys/net/core/somaxconn"); err != nil || string(host) == "77\n" {
					t.Errorf("the host has %q, %v", host, err)
				}
			}},
			{"with slashes", "LinuxPodSandboxConfig.sysctls", func(t *testing.T, f *fields) {
				if f.peer {
					t.Skip("containerd passes names on as they are")
				}
				p := f.newPod(t, plainPod, func(c *podConfig) { c.Linux.Sysctls = map[string]string{"net/core/somaxconn": "78"} })
				f.says(t, p, f.ctr("cat /proc/sys/net/core/somaxconn"), "78\n")
			}},
			{"low ports and pings are everybody's unless the pod says otherwise", "LinuxPodSandboxConfig.sysctls", func(t *testing.T, f *fields) {
				const show = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range"
				f.says(t, f.pod(t, plainPod), f.ctr(show), "0\n0\t2147483647\n")
				p := f.newPod(t, plainPod, func(c *podConfig) {
					c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "1024", "net.ipv4.ping_group_range": "1 0"}
				})
				f.says(t, p, f.ctr(show), "1024\n1\t0\n")
			}},
			{"of the node are refused", "LinuxPodSandboxConfig.sysctls", func(t *testing.T, f *fields) {
				for _, c := range []struct {
					kind podKind
					key  string
				}{{plainPod, "kernel.core_pattern"}, {plainPod, "vm.swappiness"}, {hostNetworkPod, "net.core.somaxconn"}, {hostIPCPod, "kernel.shmmax"}, {hostIPCPod, "fs.mqueue.msg_max"}} {
					cfg := f.podConfig(c.kind)
					cfg.Linux.Sysctls = map[string]string{c.key: "1"}
					id, err := f.CRI.RunPod(t.Context(), cfg)
					if err == nil {
						must(t, f.CRI.RemovePod(t.Context(), id))
					}
					if f.peer {
						if err == nil {
							t.Errorf("%s in a pod of kind %s is set", c.key, c.kind)
						}
						continue
					}
					wantCode(t, err, codes.InvalidArgument, c.key)
				}
			}},
		}},
	}
}

// freePort is a port of the node that nothing listens at.
func freePort(t *testing.T, network string) int32 {
	t.Helper()
	if network == "udp" {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		must(t, err)
		defer c.Close()
		return int32(c.LocalAddr().(*net.UDPAddr).Port)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return int32(l.Addr().(*net.TCPAddr).Port)
}

// wantTCP waits until what listens at an address says that.
func (f *fields) wantTCP(t *testing.T, address, want string) {
	t.Helper()
	must(t, says(t.Context(), waitLong, address, want))
}

// wantUDP waits until what listens at an address sends back what it gets.
func (f *fields) wantUDP(t *testing.T, address, text string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), waitLong, address+" answers", func(ctx context.Context) error {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "udp", address)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
		if _, err := conn.Write([]byte(text)); err != nil {
			return err
		}
		buf := make([]byte, 100)
		n, err := conn.Read(buf)
		if string(buf[:n]) != text {
			return fmt.Errorf("it says %q, %v", buf[:n], err)
		}
		return nil
	}))
}
