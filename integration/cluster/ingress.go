package cluster

import (
	"context"
	"fmt"
)

// StartIngress has Traefik, a program, run as a pod on each node, at port 80 of the node's address, for Ingresses of the namespace default and
// the class traefik. It waits until they are ready.
func (c *Cluster) StartIngress(ctx context.Context, program string) error {
	return c.startAddon(ctx, "traefik", program, fmt.Sprintf(ingressManifest, c.Nodes[0].Address()), "daemonset/traefik")
}

// Its rights: Traefik lists Secrets wherever it looks for Ingresses, so that it is not to look everywhere. It does not start without a list of Nodes.
const ingressManifest = `apiVersion: v1
kind: ServiceAccount
metadata: {name: traefik, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: traefik}
rules:
- {apiGroups: [networking.k8s.io], resources: [ingressclasses], verbs: [list, watch]}
- {apiGroups: [""], resources: [nodes], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: traefik}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: traefik}
subjects: [{kind: ServiceAccount, name: traefik, namespace: kube-system}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: traefik, namespace: default}
rules:
- {apiGroups: [networking.k8s.io], resources: [ingresses], verbs: [list, watch]}
- {apiGroups: [networking.k8s.io], resources: [ingresses/status], verbs: [update]}
- {apiGroups: [""], resources: [services, secrets], verbs: [list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: traefik, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: traefik}
subjects: [{kind: ServiceAccount, name: traefik, namespace: kube-system}]
---
apiVersion: networking.k8s.io/v1
kind: IngressClass
metadata: {name: traefik}
spec: {controller: traefik.io/ingress-controller}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: traefik, namespace: kube-system}
spec:
  selector: {matchLabels: {app: traefik}}
  template:
    metadata: {labels: {app: traefik}}
    spec:
      serviceAccountName: traefik
      priorityClassName: system-node-critical
      securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: traefik
        image: registry.k8s.io/traefik:cluster
        args:
        - --global.checknewversion=false
        - --entrypoints.web.address=:8000
        - --entrypoints.ping.address=:8081
        - --ping.entrypoint=ping
        - --providers.kubernetesingress.namespaces=default
        - --providers.kubernetesingress.ingressendpoint.ip=%s
        ports: [{name: web, containerPort: 8000, hostPort: 80}]
        readinessProbe: {httpGet: {path: /ping, port: 8081}, periodSeconds: 2, timeoutSeconds: 5}
        livenessProbe: {httpGet: {path: /ping, port: 8081}, periodSeconds: 10, timeoutSeconds: 10, failureThreshold: 6}
        resources: {requests: {cpu: 50m, memory: 64Mi}, limits: {memory: 256Mi}}
        securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
`
